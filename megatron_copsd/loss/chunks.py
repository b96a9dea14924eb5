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
    add_weight_gradient,
    compute_dtype,
    operand_dtype,
    project,
    write_hidden_gradient,
)
from copsd_kernels.tiled import WORK_BUFFERS
from megatron_copsd.errors import UserError, describe
from megatron_copsd.types import VocabShard

DEFAULT_SCRATCH_BYTES = 64 << 20

# Elements of one elementwise operation. On CPU a block of rows and its scratch should stay in the last cache level; on
# CUDA a block should outlast the launch of its kernel.
_BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}

# Chunks are a multiple of this many rows where the budget allows, which matrix products prefer.
_ROW_MULTIPLE = 8

_MIB = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """One chunk of rows with its logits, in buffers that the next chunk overwrites.

    Attributes:
        rows: which rows of the R.
        hidden: one [C, H] for each view, in the dtype that enters the matrix products.
        logits: one [C, V_local] for each view, divided by the temperature, without padding of the vocabulary.
        weight: [V_local, H] of the first view, a constant, without padding of the vocabulary.
        work: [WORK_BUFFERS, block, V_local] scratch for the row functions.
        tile: [rows, H] scratch for the matrix products; None where they need none.
    """

    rows: slice
    hidden: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    weight: Tensor
    work: Tensor
    tile: Tensor | None


def chunks(
    hidden: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    shard: VocabShard,
    temperature: float,
    scratch_bytes: int,
) -> Iterator[Chunk]:
    """Walk over the rows in the largest chunks whose buffers fit the budget; none where there are no rows.

    Args:
        hidden: one [R, H] for each view (student and teacher for a divergence).
        weights: one [V_local, H] for each view, padding included; the same object where views share it.
        shard: what the rows of the weights are.
        temperature: divides the logits.
        scratch_bytes: budget of all buffers together.

    Returns:
        Chunks in row order, cut in the same way on all ranks of a tensor-parallel group.

    Raises:
        UserError: not even one row fits.
    """
    total = hidden[0].shape[0]
    if total == 0:
        return
    scratch = _allocate_scratch(len(hidden), total, weights[0], shard, scratch_bytes)
    real = [weight.detach()[: shard.valid] for weight in weights]
    shared = all(weight is weights[0] for weight in weights)
    size = scratch.hidden[0].shape[0]
    for start in range(0, total, size):
        rows = slice(start, min(start + size, total))
        length = rows.stop - rows.start
        # Copied so that all views enter the product with the same strides and alignment: equal in, equal out.
        operands = tuple(
            buffer[:length].copy_(source[rows]) for buffer, source in zip(scratch.hidden, hidden, strict=True)
        )
        logits = tuple(buffer[:length] for buffer in scratch.logits)
        if shared:
            project(operands, real[0], logits, scratch.tile)
        else:
            for operand, weight, out in zip(operands, real, logits, strict=True):
                project((operand,), weight, (out,), scratch.tile)
        if temperature != 1:
            for out in logits:
                out.mul_(1 / temperature)
        yield Chunk(rows, operands, logits, real[0], scratch.work, scratch.tile)


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
            if not (on and like.requires_grad):
                return None
            return torch.zeros(like.shape, dtype=dtype, device=like.device)

        return cls(zeros(hidden), zeros(weight))

    @property
    def wanted(self) -> bool:
        """Whether any gradient is asked for."""
        return self.hidden is not None or self.weight is not None

    def add(self, chunk: Chunk, dlogits: Tensor) -> None:
        """Add one chunk's part, given the gradient [C, V_local] of its first view's logits before the temperature."""
        dlogits = dlogits.to(chunk.hidden[0].dtype)
        if self.hidden is not None:
            write_hidden_gradient(dlogits, chunk.weight, self.hidden[chunk.rows], chunk.tile)
        if self.weight is not None:
            real = self.weight[: chunk.weight.shape[0]]
            add_weight_gradient(dlogits, chunk.hidden[0], real, chunk.tile)

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


def gather_shards(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Parts of all shards, stacked in rank order: [...] -> [shards, ...]; one shard where ``group`` is None.

    Collectives: one all_gather over ``group``.
    """
    if group is None or dist.get_world_size(group) == 1:
        return part[None]
    parts = part.new_empty(dist.get_world_size(group), *part.shape)
    dist.all_gather(list(parts), part, group=group)
    return parts


def sum_over_shards_(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum of all shards' parts, in place and equal on all ranks; the part itself where ``group`` is None.

    Collectives: one all_reduce over ``group``; none for an empty part.
    """
    if group is not None and dist.get_world_size(group) > 1 and part.numel() > 0:
        dist.all_reduce(part, group=group)
    return part


@dataclass(frozen=True)
class _Scratch:
    """Buffers of one walk, allocated once and reused by every chunk; shapes as in ``Chunk``."""

    hidden: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    work: Tensor
    tile: Tensor | None


def _allocate_scratch(views: int, rows: int, weight: Tensor, shard: VocabShard, scratch_bytes: int) -> _Scratch:
    """Buffers of at most ``scratch_bytes``, sized by what is equal on all ranks: padding counts."""
    width, hidden_size = weight.shape
    dtype, device = compute_dtype(weight), weight.device
    item = dtype.itemsize
    tiled = weight.dtype != dtype
    tile_rows = min(width, max(1, scratch_bytes // 8 // (hidden_size * item))) if tiled else 0
    block = min(rows, _BLOCK_ELEMENTS[device.type] // width, scratch_bytes // 4 // (WORK_BUFFERS * width * item))
    block = max(1, block)
    fixed_bytes = tile_rows * hidden_size * item + WORK_BUFFERS * block * width * item
    row_bytes = views * (width + hidden_size) * item
    if operand_dtype(weight) != dtype:
        row_bytes += width * weight.dtype.itemsize  # the logits' gradient, rounded to enter the products
    largest = (scratch_bytes - fixed_bytes) // row_bytes
    if largest < 1:
        rule = f"one row of {width} logits and its buffers takes {(fixed_bytes + row_bytes) / _MIB:.2f} MiB"
        raise UserError(describe("loss.scratch_mb", scratch_bytes / _MIB, rule, "Raise the budget."))
    size = _balance(rows, largest)
    operand = operand_dtype(weight)
    return _Scratch(
        hidden=tuple(torch.empty(size, hidden_size, dtype=operand, device=device) for _ in range(views)),
        logits=tuple(torch.empty(size, shard.valid, dtype=dtype, device=device) for _ in range(views)),
        work=torch.empty(WORK_BUFFERS, block, shard.valid, dtype=dtype, device=device),
        tile=torch.empty(tile_rows, hidden_size, dtype=dtype, device=device) if tiled else None,
    )


def _balance(rows: int, largest: int) -> int:
    """Even out the chunks (the last would often be tiny), in multiples of ``_ROW_MULTIPLE`` where they allow."""
    if largest >= _ROW_MULTIPLE:
        largest -= largest % _ROW_MULTIPLE
    count = -(-rows // largest)
    size = -(-rows // count)
    return min(largest, size + -size % _ROW_MULTIPLE, rows)
