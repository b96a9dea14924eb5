"""How many operations the matrix products of a computation take."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_flops(run: Callable[[], object]) -> int:
    """Operations of all matrix products, those that accumulate in place too, which torch's counter leaves out."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _product}) as counted:
        run()
    return counted.get_total_flops()


def _product(
    shape: torch.Size, left: torch.Size, right: torch.Size, *, beta: float = 1, out_shape: torch.Size | None = None
) -> int:
    return 2 * left[0] * left[1] * right[1]
