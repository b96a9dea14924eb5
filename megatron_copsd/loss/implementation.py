"""Which way a fused loss is computed here, and why.

torch      chunks of rows, plain torch: runs anywhere, in any dtype
chunk      chunks of rows, Triton row kernels: fewest products with the output weight
streaming  Triton kernels that make logits tile by tile: least memory, more products
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from copsd_kernels.arguments import FLOATING, Arguments
from copsd_kernels.gemm import scratch_shape
from copsd_kernels.rows import RowKernels
from copsd_kernels.scratch import WORK_BUFFERS, ChunkPlan, ColumnPlan, plan_chunks, plan_columns
from megatron_copsd.errors import UserError, describe
from megatron_copsd.loss import chunked
from megatron_copsd.loss.autograd import Gradients, Views
from megatron_copsd.loss.chunked import DivergenceRows
from megatron_copsd.loss.spec import DivergenceSpec

Implementation = Literal["auto", "torch", "chunk", "streaming"]

_MANY_ROWS = 1 << 20


@dataclass(frozen=True)
class Choice:
    """One line of what ``auto`` goes by; the first that fits is taken.

    Attributes:
        implementation: what it takes.
        device: ``cpu`` or ``cuda``.
        float64: whether weights are float64; None for any dtype.
        most_chunk_rows: it takes this only where the budget holds no more rows of both views' logits than this.
        reason: why, shown when a run starts.
        evidence: where the numbers behind it are.
    """

    implementation: Literal["torch", "chunk", "streaming"]
    device: str
    float64: bool | None
    most_chunk_rows: int | None
    reason: str
    evidence: str

    def fits(self, weight: Tensor, chunk_rows: int) -> bool:
        """Whether the line speaks of this weight, where the budget holds so many rows of logits."""
        return (
            weight.device.type == self.device
            and self.float64 in (None, weight.dtype == torch.float64)
            and (self.most_chunk_rows is None or chunk_rows <= self.most_chunk_rows)
        )


CHOICES = (
    Choice(
        "torch", "cpu", None, None,
        reason="Triton needs a GPU",
        evidence="benchmarks/ (Xeon): 0.74 to 0.82 of dense's time, 0.04 to 0.08 of its memory",
    ),
    Choice("torch", "cuda", True, None, reason="the Triton kernels take no float64", evidence="by construction"),
    Choice(
        "streaming", "cuda", False, 127,
        reason="the budget holds fewer rows of logits than matrix products need",
        evidence="not measured on a GPU: 6 to 8 products instead of 4, which chunks under about 128 rows make up for "
        "by reading the weight once for each of them (docs/kernels.md)",
    ),
    Choice(
        "chunk", "cuda", False, None,
        reason="fewest products with the output weight",
        evidence="not measured on a GPU: 4 products instead of 6 to 8 (docs/kernels.md)",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Walk:
    """The two fused losses over all rows of a batch, with the arguments of ``streaming.divergence`` and its sibling."""

    divergence: Callable[[Views, DivergenceSpec, Tensor, Gradients], DivergenceRows]
    cross_entropy: Callable[[Views, Tensor, float, Tensor, Gradients], tuple[Tensor, Tensor]]


def implementation_of(
    implementation: Implementation, weight: Tensor, scratch_bytes: int | None, *, top_k: bool = False
) -> Walk:
    """Return the functions that compute losses over this weight.

    Raises:
        UserError: as for ``choose``.
    """
    chosen = choose(implementation, weight, scratch_bytes, top_k=top_k).implementation
    # Imported only where they run, so that a machine without Triton can use the torch ones.
    if chosen == "streaming":
        from megatron_copsd.loss import streaming

        return Walk(streaming.divergence, streaming.cross_entropy)
    kernels = _row_kernels(chosen)
    return Walk(partial(chunked.divergence, kernels=kernels), partial(chunked.cross_entropy, kernels=kernels))


def _row_kernels(implementation: Literal["torch", "chunk"]) -> RowKernels:
    if implementation == "torch":
        from copsd_kernels import torch_rows

        return torch_rows
    from copsd_kernels import chunk_rows

    return chunk_rows


def choose(implementation: Implementation, weight: Tensor, scratch_bytes: int | None, *, top_k: bool = False) -> Choice:
    """Say which way losses over this weight are computed.

    Args:
        implementation: ``loss.implementation``.
        weight: [V_local, H]; only its shape, dtype and device matter.
        scratch_bytes: budget of the scratch; None for the device's default.
        top_k: whether the teacher is cut to its likeliest tokens, which needs whole rows of logits.

    Raises:
        UserError: an argument breaks its rule, or the implementation that was asked for cannot run here, or not with
            ``top_k``.
    """
    check = Arguments("choose")
    check.choice("implementation", implementation, get_args(Implementation))
    check.tensor("weight", weight, "V_local H", FLOATING)
    if scratch_bytes is not None:
        check.integer("scratch_bytes", scratch_bytes, 1)
    check.instance("top_k", top_k, bool)
    if implementation == "auto":
        rows = _rows_of_chunk(weight, scratch_bytes)
        fitting = (choice for choice in CHOICES if choice.fits(weight, rows))
        return next(choice for choice in fitting if not (top_k and choice.implementation == "streaming"))
    if implementation == "streaming" and top_k:
        rule = "makes no whole row of logits, of which loss.teacher_top_k could be taken"
        raise UserError(describe("loss.implementation", implementation, rule, "Use chunk or torch."))
    if implementation != "torch" and not _suits_triton(weight):
        rule = f"runs on CUDA and not in float64; the weight is {weight.dtype} on {weight.device}"
        raise UserError(describe("loss.implementation", implementation, rule, "Set it to auto or torch."))
    return Choice(implementation, weight.device.type, None, None, "loss.implementation asks for it", "")


def explain(
    implementation: Implementation,
    weight: Tensor,
    rows: int,
    views: int,
    scratch_bytes: int | None,
    *,
    top_k: bool = False,
) -> str:
    """Say which way is taken, why, and how many bytes of scratch ``rows`` rows of ``views`` views take at most."""
    choice = choose(implementation, weight, scratch_bytes, top_k=top_k)
    plan = plan_scratch(choice.implementation, weight, rows, views, scratch_bytes)
    if isinstance(plan, ColumnPlan):
        how = f"{plan.columns} columns of the logits' gradient at a time"
    else:
        how = f"{plan.rows} rows of logits at a time"
    return f"loss: {choice.implementation} ({choice.reason}); {how}, {plan.bytes / 2**20:.1f} MiB of scratch at most"


def plan_scratch(
    implementation: Literal["torch", "chunk", "streaming"],
    weight: Tensor,
    rows: int,
    views: int,
    scratch_bytes: int | None,
    *,
    differentiate: bool = True,
) -> ChunkPlan | ColumnPlan:
    """Return the buffers of a walk over ``rows`` rows, without making any.

    Raises:
        UserError: an argument breaks its rule, or the budget is too little.
    """
    check = Arguments("plan_scratch")
    check.choice("implementation", implementation, [name for name in get_args(Implementation) if name != "auto"])
    check.tensor("weight", weight, "V_local H", FLOATING)
    check.integer("rows", rows, 1)
    check.integer("views", views, 1, 2)
    if scratch_bytes is not None:
        check.integer("scratch_bytes", scratch_bytes, 1)
    check.instance("differentiate", differentiate, bool)
    if implementation == "streaming":
        return plan_columns(scratch_shape(weight, rows, views, 0, differentiate), scratch_bytes)
    shape = scratch_shape(weight, rows, views, WORK_BUFFERS[implementation], differentiate)
    return plan_chunks(shape, scratch_bytes)


def _rows_of_chunk(weight: Tensor, scratch_bytes: int | None) -> int:
    try:
        return plan_chunks(scratch_shape(weight, _MANY_ROWS, 2, 0, True), scratch_bytes).rows
    except UserError:
        return 0


def _suits_triton(weight: Tensor) -> bool:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (weight.is_cuda or interpreted) and weight.dtype != torch.float64
