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
from copsd_kernels.scratch import ScratchShape, scratch_sizes
from megatron_copsd.loss.gradients import Gradients
from megatron_copsd.loss.views import Views


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


def chunks(views: Views, gradients: Gradients, work_buffers: int) -> Iterator[Chunk]:
    """Walk over the rows in the largest chunks whose buffers fit the budget; none where there are no rows.

    What the caller leaves in a chunk's ``dlogits`` goes into ``gradients`` before the walk ends.

    Args:
        views: hidden states, weights and the budget.
        gradients: of the first view; may want nothing.
        work_buffers: blocks of scratch that the row functions need.

    Returns:
        Chunks in row order, cut in the same way on all ranks of a tensor-parallel group.

    Raises:
        UserError: not even one row fits.
    """
    total = views.num_rows
    if total == 0:
        return
    weight = views.weights[0]
    plan = plan_chunks(len(views.hidden), total, weight, work_buffers, gradients.wanted, views.scratch_bytes)
    scratch = _allocate(plan, len(views.hidden), weight, views.shard.valid)
    real = views.valid_weights()
    group_size, chunk_size = scratch.hidden[0].shape[0], scratch.logits[0].shape[0]
    for group in _cut(0, total, group_size):
        # Copied so that all views enter the product with the same strides and alignment: equal in, equal out.
        operands = [
            buffer[: group.stop - group.start].copy_(source[group])
            for buffer, source in zip(scratch.hidden, views.hidden, strict=True)
        ]
        dlogits = scratch.dlogits[: group.stop - group.start]
        for rows in _cut(group.start, group.stop, chunk_size):
            inside = slice(rows.start - group.start, rows.stop - group.start)
            logits = tuple(buffer[: rows.stop - rows.start] for buffer in scratch.logits)
            parts = [operand[inside] for operand in operands]
            if views.shared_weight:
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
class _Scratch:
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


@dataclass(frozen=True)
class ChunkPlan:
    """Sizes of a walk's buffers.

    Attributes:
        rows: C, of a chunk.
        group_rows: G, of a group of chunks.
        in_place: whether the logits' gradient is written over the logits.
        work_shape: buffers and rows of the row functions' scratch.
        tile_rows: of the products' scratch; 0 where they need none.
        bytes: of all buffers together.
    """

    rows: int
    group_rows: int
    in_place: bool
    work_shape: tuple[int, int]
    tile_rows: int
    bytes: int


def plan_chunks(
    views: int, rows: int, weight: Tensor, work_buffers: int, differentiate: bool, scratch_bytes: int | None
) -> ChunkPlan:
    """Return the largest buffers within the budget, sized by what is equal on all ranks: padding counts.

    Args:
        views: 1 or 2.
        rows: R.
        weight: [V_local, H]; only its shape, dtype and device matter.
        work_buffers: blocks of scratch that the row functions need.
        differentiate: whether gradients are wanted.
        scratch_bytes: the budget; None for the device's default.

    Raises:
        UserError: not even one row fits.
    """
    width, hidden_size = weight.shape
    dtype, operand = compute_dtype(weight), operand_dtype(weight)
    shape = ScratchShape(
        views=views,
        rows=rows,
        width=width,
        columns=width,
        hidden=hidden_size,
        item=dtype.itemsize,
        operand_item=operand.itemsize,
        weight_item=weight.dtype.itemsize,
        work_buffers=work_buffers,
        differentiate=differentiate,
        device=weight.device.type,
    )
    sizes = scratch_sizes(shape, scratch_bytes)
    return ChunkPlan(sizes.chunk, sizes.group, shape.in_place, (work_buffers, sizes.block), sizes.tile, sizes.bytes)


def _allocate(plan: ChunkPlan, views: int, weight: Tensor, valid: int) -> _Scratch:
    dtype, operand, device, hidden_size = compute_dtype(weight), operand_dtype(weight), weight.device, weight.shape[1]
    logits = tuple(torch.empty(plan.rows, valid, dtype=dtype, device=device) for _ in range(views))
    return _Scratch(
        hidden=tuple(torch.empty(plan.group_rows, hidden_size, dtype=operand, device=device) for _ in range(views)),
        logits=logits,
        dlogits=logits[0] if plan.in_place else torch.empty(plan.group_rows, valid, dtype=operand, device=device),
        work=torch.empty(*plan.work_shape, valid, dtype=dtype, device=device),
        tile=torch.empty(plan.tile_rows, hidden_size, dtype=dtype, device=device) if plan.tile_rows else None,
    )
