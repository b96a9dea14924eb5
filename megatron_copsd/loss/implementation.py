"""Which row functions run a fused loss, and on what."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from megatron_copsd.errors import UserError, describe

Implementation = Literal["auto", "torch", "triton"]


def row_functions(implementation: Implementation, weight: Tensor) -> ModuleType:
    """Return the module of row functions (``copsd_kernels.rows`` has their contract) for losses over this weight.

    ``auto`` is Triton on CUDA, except in float64, and plain torch elsewhere.

    Raises:
        UserError: Triton was asked for where it cannot run.
    """
    if implementation == "torch" or (implementation == "auto" and not _suits_triton(weight)):
        from copsd_kernels import tiled

        return tiled
    if not _suits_triton(weight) and not (weight.dtype != torch.float64 and os.environ.get("TRITON_INTERPRET") == "1"):
        rule = f"runs on CUDA and not in float64; the weight is {weight.dtype} on {weight.device}"
        raise UserError(describe("loss.implementation", implementation, rule, "Set it to auto or torch."))
    # Only here, so that a machine without Triton can use the torch ones.
    from copsd_kernels import row_triton

    return row_triton


def _suits_triton(weight: Tensor) -> bool:
    return weight.is_cuda and weight.dtype != torch.float64
