"""The walk over rows that all fused losses make: logits in bounded scratch, products with the output weight around it.

Two levels. A *chunk* of rows has its logits in scratch, float32; a *group* of chunks shares the products that make the
gradients from the logits' gradient, which it holds in the (often smaller) dtype that enters them. Small chunks keep
the scratch small; large groups keep the products efficient and the passes over the weight's gradient few. Where both
dtypes are the same, the logits' gradient is written over the logits and a group is one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from copsd_kernels.gemm import compute_dtype, operand_dtype, project
from megatron_copsd.errors import UserError, describe
from megatron_copsd.loss.gradients import Gradients
from megatron_copsd.types import VocabShard

# Where the caller sets no budget. On CPU as many rows as matrix products need to run at full speed (measured: 96 rows
# reach two thirds of it, 192 nearly all). On CUDA bytes: chunks of about 512 rows in groups of 2048 at V = 151936.
_DEFAULT_CPU_ROWS = 192
_DEFAULT_CUDA_BYTES = 1280 << 20

_CHUNKS_PER_GROUP = 4

# Elements of one elementwise operation in plain torch. On CPU a block of rows and its scratch should stay in the last
# cache level; on CUDA a block should outlast the launch of its kernel.
_BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}

# Chunks are a multiple of this many rows where the budget allows, which matrix products prefer.
_ROW_MULTIPLE = {"cpu": 8, "cuda": 64}

_MIB = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """One chunk of rows with its logits, in buffers that the next chunk overwrites.

    Attributes:
        rows: which rows of the R.
        logits: one [C, V_local] for each view, not divided by the temperature, without padding of the vocabulary.
        dlogits: [C, V_local], where the gradient of the first view's logits is to be written, if one is wanted; may be
            those logits themselves.
        work: [buffers, block, V_local] scratch for the row functions.
    """

    rows: slice
    logits: tuple[Tensor, ...]
    dlogits: Tensor
    work: Tensor


def chunks(
    hidden: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    shard: VocabShard,
    gradients: Gradients,
    work_buffers: int,
    scratch_bytes: int | None,
) -> Iterator[Chunk]:
    """Walk over the rows in the largest chunks whose buffers fit the budget; none where there are no rows.

    What the caller leaves in a chunk's ``dlogits`` goes into ``gradients`` before the walk ends.

    Args:
        hidden: one [R, H] for each view (student and teacher for a divergence).
        weights: one [V_local, H] for each view, padding included; the same object where views share it.
        shard: what the rows of the weights are.
        gradients: of the first view; may want nothing.
        work_buffers: blocks of scratch that the row functions need.
        scratch_bytes: budget of all buffers together; None for the device's default.

    Returns:
        Chunks in row order, cut in the same way on all ranks of a tensor-parallel group.

    Raises:
        UserError: not even one row fits.
    """
    total = hidden[0].shape[0]
    if total == 0:
        return
    scratch = allocate(len(hidden), total, weights[0], shard, work_buffers, gradients.wanted, scratch_bytes)
    real = [weight.detach()[: shard.valid] for weight in weights]
    shared = all(weight is weights[0] for weight in weights)
    group_size, chunk_size = scratch.hidden[0].shape[0], scratch.logits[0].shape[0]
    for group in _cut(0, total, group_size):
        # Copied so that all views enter the product with the same strides and alignment: equal in, equal out.
        operands = [
            buffer[: group.stop - group.start].copy_(source[group])
            for buffer, source in zip(scratch.hidden, hidden, strict=True)
        ]
        dlogits = scratch.dlogits[: group.stop - group.start]
        for rows in _cut(group.start, group.stop, chunk_size):
            inside = slice(rows.start - group.start, rows.stop - group.start)
            logits = tuple(buffer[: rows.stop - rows.start] for buffer in scratch.logits)
            parts = [operand[inside] for operand in operands]
            if shared:
                project(parts, real[0], logits, scratch.tile)
            else:
                for part, weight, out in zip(parts, real, logits, strict=True):
                    project((part,), weight, (out,), scratch.tile)
            yield Chunk(rows, logits, dlogits[inside], scratch.work)
        gradients.add(group, operands[0], real[0], dlogits, scratch.tile)


def _cut(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


@dataclass(frozen=True)
class Scratch:
    """Buffers of one walk, allocated once and reused.

    Attributes:
        hidden: one [G, H] for each view, in the dtype that enters the products.
        logits: one [C, V_valid] for each view.
        dlogits: [G, V_valid]; the first of ``logits`` where its dtype enters the products.
        work: for the row functions.
        tile: [rows, H] for the products; None where they need none.
    """

    hidden: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    dlogits: Tensor
    work: Tensor
    tile: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers together."""
        shared = any(self.dlogits is logits for logits in self.logits)
        buffers = (*self.hidden, *self.logits, self.work, None if shared else self.dlogits, self.tile)
        return sum(buffer.nbytes for buffer in buffers if buffer is not None)


def allocate(
    views: int,
    rows: int,
    weight: Tensor,
    shard: VocabShard,
    work_buffers: int,
    differentiate: bool,
    scratch_bytes: int | None,
) -> Scratch:
    """Buffers of at most ``scratch_bytes``, sized by what is equal on all ranks: padding counts.

    Args:
        views: hidden states that have logits (student and teacher for a divergence).
        rows: R.
        weight: [V_local, H], of which only shape, dtype and device are used; for a fake tensor the buffers are fake.
        shard: what the rows of ``weight`` are.
        work_buffers: blocks of scratch that the row functions need.
        differentiate: whether gradients are wanted.
        scratch_bytes: budget; None for the device's default.

    Raises:
        UserError: not even one row fits.
    """
    width, hidden_size = weight.shape
    dtype, operand, device = compute_dtype(weight), operand_dtype(weight), weight.device
    item = dtype.itemsize
    budget = _default_budget(views * width * item, device) if scratch_bytes is None else scratch_bytes
    in_place = operand == dtype or not differentiate
    tiled = weight.dtype != dtype
    tile_rows = min(width, max(1, budget // 8 // (hidden_size * item))) if tiled else 0
    block = 0
    if work_buffers > 0:
        block = max(1, min(rows, _BLOCK_ELEMENTS[device.type] // width, budget // 4 // (work_buffers * width * item)))
    fixed_bytes = tile_rows * hidden_size * item + work_buffers * block * width * item
    chunks_per_group = 1 if in_place else _CHUNKS_PER_GROUP
    group_row_bytes = views * hidden_size * operand.itemsize + (0 if in_place else width * operand.itemsize)
    row_bytes = views * width * item + chunks_per_group * group_row_bytes
    largest = (budget - fixed_bytes) // row_bytes
    if largest < 1:
        rule = f"one row of {width} logits and its buffers takes {(fixed_bytes + row_bytes) / _MIB:.2f} MiB"
        raise UserError(describe("loss.scratch_mb", budget / _MIB, rule, "Raise the budget."))
    size = _balance(rows, largest, _ROW_MULTIPLE[device.type])
    group = min(rows, size * chunks_per_group)
    logits = tuple(torch.empty(size, shard.valid, dtype=dtype, device=device) for _ in range(views))
    return Scratch(
        hidden=tuple(torch.empty(group, hidden_size, dtype=operand, device=device) for _ in range(views)),
        logits=logits,
        dlogits=logits[0] if in_place else torch.empty(group, shard.valid, dtype=operand, device=device),
        work=torch.empty(work_buffers, block, shard.valid, dtype=dtype, device=device),
        tile=torch.empty(tile_rows, hidden_size, dtype=dtype, device=device) if tiled else None,
    )


def _default_budget(row_bytes: int, device: torch.device) -> int:
    """Budget in bytes, given the logits of one row; a quarter on top for what goes with them."""
    return _DEFAULT_CPU_ROWS * row_bytes * 5 // 4 if device.type == "cpu" else _DEFAULT_CUDA_BYTES


def _balance(rows: int, largest: int, multiple: int) -> int:
    """Even out the chunks (the last would often be tiny), in multiples where they allow."""
    if largest >= multiple:
        largest -= largest % multiple
    count = -(-rows // largest)
    size = -(-rows // count)
    return min(largest, size + -size % multiple, rows)
