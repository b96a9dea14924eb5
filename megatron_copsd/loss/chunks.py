"""What the fused losses share: chunks of rows in a byte budget, gradients made in the forward pass, collectives.

Rows are processed in chunks whose logits fit a budget, so the logits [R, V] of the batch never exist. Both passes over
the output weight that a gradient needs happen while the chunk's logits are there; the backward pass only scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from copsd_kernels.gemm import (
    add_hidden_gradient,
    add_weight_gradient,
    compute_dtype,
    multiplies_natively,
    operand_dtype,
    project,
)
from copsd_kernels.tiled import WORK_BUFFERS
from megatron_copsd.errors import UserError, describe
from megatron_copsd.types import VocabShard

DEFAULT_SCRATCH_BYTES = 64 << 20

# Elements of one elementwise operation. On CPU a block of rows and its scratch should stay in the last cache level; on
# CUDA a block should outlast the launch of its kernel.
_BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}

# Chunks are a multiple of this many rows where the budget allows, which matrix products prefer.
_ROW_MULTIPLE = 8

_MIB = 1 << 20


@dataclass(frozen=True)
class Scratch:
    """Buffers of one call, allocated once and reused by every chunk.

    Attributes:
        logits: one [C, V_local] for each hidden state of a row, without padding of the vocabulary.
        hidden: one [C, H] for each hidden state of a row, in the dtype that enters the matrix products.
        work: [WORK_BUFFERS, block, V_local] for the row functions.
        tile: [rows, H] for upcast rows of the weight; None where it is not needed.
    """

    logits: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]
    work: Tensor
    tile: Tensor | None


def allocate_scratch(views: int, rows: int, weight: Tensor, shard: VocabShard, scratch_bytes: int) -> Scratch:
    """Choose the largest chunk that fits the budget and allocate its buffers; sizes are equal on all ranks of a group.

    Args:
        views: hidden states of each row (2 for a divergence, 1 for a cross-entropy).
        rows: R; 0 gets the scratch of 1.
        weight: [V_local, H], this rank's shard, padding included.
        shard: what the rows of ``weight`` are.
        scratch_bytes: budget of all buffers together.

    Returns:
        Scratch of at most ``scratch_bytes``.

    Raises:
        UserError: not even one row fits.
    """
    rows = max(rows, 1)
    width, hidden_size = weight.shape
    dtype = compute_dtype(weight)
    item = dtype.itemsize
    upcast = weight.dtype != dtype
    tile_rows = min(width, max(1, scratch_bytes // 8 // (hidden_size * item))) if upcast else 0
    block = _BLOCK_ELEMENTS[weight.device.type] // width
    block = max(1, min(block, rows, scratch_bytes // 4 // (WORK_BUFFERS * width * item)))
    fixed_bytes = tile_rows * hidden_size * item + WORK_BUFFERS * block * width * item
    row_bytes = views * (width + hidden_size) * item
    if upcast and multiplies_natively(weight):
        row_bytes += width * weight.dtype.itemsize  # the chunk's gradient, rounded to the weight's dtype
    chunk = (scratch_bytes - fixed_bytes) // row_bytes
    if chunk < 1:
        needed = (fixed_bytes + row_bytes) / _MIB
        raise UserError(
            describe(
                "loss.scratch_mb",
                scratch_bytes / _MIB,
                f"one row of {width} logits and its buffers takes {needed:.2f} MiB",
                "Raise the budget.",
            )
        )
    chunk = _balance(rows, chunk)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=weight.device)

    return Scratch(
        logits=tuple(empty(chunk, shard.valid) for _ in range(views)),
        hidden=tuple(empty(chunk, hidden_size, dtype=operand_dtype(weight)) for _ in range(views)),
        work=empty(WORK_BUFFERS, block, shard.valid),
        tile=empty(tile_rows, hidden_size) if upcast else None,
    )


@dataclass(frozen=True)
class Chunk:
    """One chunk of rows with its logits.

    Attributes:
        rows: which rows of the R.
        logits: one [C, V_local] for each hidden state, divided by the temperature.
        hidden: one [C, H] for each hidden state, as it entered the product.
    """

    rows: slice
    logits: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]


def chunks(
    hidden: tuple[Tensor, ...], weights: tuple[Tensor, ...], temperature: float, scratch: Scratch
) -> Iterator[Chunk]:
    """Walk over the rows, with the logits of each chunk in the scratch until the next is asked for.

    Args:
        hidden: one [R, H] for each view.
        weights: one [V_local, H] for each view, without padding of the vocabulary.
        temperature: divides the logits.
        scratch: buffers from ``allocate_scratch``.

    Returns:
        Iterator over chunks in row order.
    """
    total, size = hidden[0].shape[0], scratch.hidden[0].shape[0]
    for start in range(0, total, size):
        rows = slice(start, min(start + size, total))
        length = rows.stop - rows.start
        # Copied so that both views enter the product with the same strides and alignment: equal in, equal out.
        operands = tuple(
            buffer[:length].copy_(source[rows]) for buffer, source in zip(scratch.hidden, hidden, strict=True)
        )
        logits = tuple(buffer[:length] for buffer in scratch.logits)
        if all(weight is weights[0] for weight in weights):
            project(operands, weights[0], logits, scratch.tile)
        else:
            for operand, weight, out in zip(operands, weights, logits, strict=True):
                project((operand,), weight, (out,), scratch.tile)
        if temperature != 1:
            for out in logits:
                out.mul_(1 / temperature)
        yield Chunk(rows, logits, operands)


@dataclass(frozen=True)
class Gradients:
    """Gradients of a loss with respect to hidden states [R, H] and weight [V_local, H]; None where not asked for."""

    hidden: Tensor | None
    weight: Tensor | None

    @classmethod
    def zeros(cls, hidden: Tensor, weight: Tensor) -> Gradients:
        """Accumulators in ``compute_dtype`` for the arguments that require a gradient where gradients are on."""
        dtype, on = compute_dtype(weight), torch.is_grad_enabled()

        def zeros(like: Tensor) -> Tensor | None:
            return torch.zeros_like(like, dtype=dtype, requires_grad=False) if on and like.requires_grad else None

        return cls(zeros(hidden), zeros(weight))

    @property
    def wanted(self) -> bool:
        """Whether any gradient is asked for."""
        return self.hidden is not None or self.weight is not None

    def add(self, chunk: Chunk, dlogits: Tensor, weight: Tensor, tile: Tensor | None) -> None:
        """Add one chunk's part, given the gradient [C, V_local] of its logits before they met the temperature."""
        dlogits = dlogits.to(chunk.hidden[0].dtype)
        if self.hidden is not None:
            add_hidden_gradient(dlogits, weight, self.hidden[chunk.rows], tile)
        if self.weight is not None:
            add_weight_gradient(dlogits, chunk.hidden[0], self.weight[: weight.shape[0]], tile)

    def attach(self, loss: Tensor, hidden: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """Make ``loss`` differentiable, with these gradients, in ``hidden`` and ``weight``.

        Collectives: one all_reduce [R, H] over ``group`` before rounding, if the hidden states' gradient is wanted.
        """
        if not self.wanted:
            return loss
        if self.hidden is not None:
            sum_over_shards_(self.hidden, group)
        rounded = (None if g is None else g.to(hidden.dtype) for g in (self.hidden, self.weight))
        return _PrecomputedGradients.apply(hidden, weight, loss, *rounded)


class _PrecomputedGradients(torch.autograd.Function):
    """A scalar whose gradients are known; the backward pass multiplies them, in place, by the upstream gradient.

    In place because the weight's gradient is as large as the weight. A second backward pass through the same graph is
    therefore refused by autograd ("modified by an inplace operation").
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        loss: Tensor,
        hidden_gradient: Tensor | None,
        weight_gradient: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if g is None else g.mul_(upstream) for g in ctx.saved_tensors)
        return (*scaled, None, None, None)


def real_rows(weight: Tensor, shard: VocabShard) -> Tensor:
    """Rows of the shard that are vocabulary entries, as a constant [V_local without padding, H]."""
    return weight.detach()[: shard.valid]


def gather_shards(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Parts of all shards, stacked in rank order: [...] -> [shards, ...]; one shard where ``group`` is None.

    Collectives: one all_gather over ``group``.
    """
    if group is None or dist.get_world_size(group) == 1:
        return part[None]
    parts = part.new_empty(dist.get_world_size(group), *part.shape)
    dist.all_gather_into_tensor(parts, part, group=group)
    return parts


def sum_over_shards_(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum of all shards' parts, in place and equal on all ranks; the part itself where ``group`` is None.

    Collectives: one all_reduce over ``group``; none for an empty part.
    """
    if group is not None and dist.get_world_size(group) > 1 and part.numel() > 0:
        dist.all_reduce(part, group=group)
    return part


def _balance(rows: int, largest: int) -> int:
    """Even out the chunks (the last would often be tiny), in multiples of ``_ROW_MULTIPLE`` where they allow."""
    if largest >= _ROW_MULTIPLE:
        largest -= largest % _ROW_MULTIPLE
    count = -(-rows // largest)
    size = -(-rows // count)
    return min(largest, size + -size % _ROW_MULTIPLE, rows)
