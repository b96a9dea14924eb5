"""The fused losses over chunks of rows, whose logits are in bounded scratch: four products with the output weight.

Two levels. A *chunk* of rows has its logits in scratch, float32; a *group* of chunks shares the products that make the
gradients from the logits' gradient, which it holds in the (often smaller) dtype that enters them. Small chunks keep
the scratch small; large groups keep the products efficient and the passes over the weight's gradient few. Where both
dtypes are the same, the logits' gradient is written over the logits and a group is one chunk.

``streaming`` offers the same functions without any logits in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from copsd_kernels.gemm import compute_dtype, operand_dtype, product_scratch, project, scratch_shape
from copsd_kernels.rows import (
    LogitsGradient,
    RowKernels,
    RowSums,
    SoftmaxStatistics,
    Statistic,
    label_logits,
    merge_statistics,
)
from copsd_kernels.scratch import ChunkPlan, plan_chunks
from megatron_copsd.loss.autograd import Gradients, Views
from megatron_copsd.loss.shards import gather_shards, keep_top_k_, sum_over_shards_
from megatron_copsd.loss.spec import DivergenceSpec


@dataclass(frozen=True)
class DivergenceRows:
    """What a walk over all rows yields; float64.

    Attributes:
        sums: of all R rows, over the whole vocabulary.
        student_entropy: [R], in nats.
        teacher_entropy: [R], in nats.
        teacher_tail_mass: [R], the teacher's probability outside ``DivergenceSpec.teacher_top_k``; 0 without it.
    """

    sums: RowSums
    student_entropy: Tensor
    teacher_entropy: Tensor
    teacher_tail_mass: Tensor

    @classmethod
    def zeros(cls, rows: int, device: torch.device) -> DivergenceRows:
        """All zero, for ``rows`` rows."""
        student_entropy, teacher_entropy, tail = (
            torch.zeros(rows, dtype=torch.float64, device=device) for _ in range(3)
        )
        return cls(RowSums.zeros(rows, device), student_entropy, teacher_entropy, tail)


def divergence(
    views: Views, spec: DivergenceSpec, row_weights: Tensor, gradients: Gradients, kernels: RowKernels
) -> DivergenceRows:
    """Row sums of the divergence between student and teacher, and the gradients of the weighted sum over rows.

    Args:
        views: student and teacher.
        spec: which divergence.
        row_weights: [R] float64.
        gradients: where the wanted ones go.
        kernels: ``torch_rows`` or ``chunk_rows``.

    Collectives: for each chunk one all_gather [C, 6] (and [C, k + 1] with ``teacher_top_k``) and, where the gradient
    needs it, one all_reduce [C, 5]; else one all_reduce [R, 5] at the end. All float64.
    """
    found = DivergenceRows.zeros(views.num_rows, row_weights.device)
    sums_at_once = gradients.wanted and spec.gradient_needs_sums
    for chunk in chunks(views, gradients, kernels.WORK_BUFFERS):
        student, teacher = chunk.logits
        if spec.teacher_top_k is not None:
            whole = keep_top_k_(teacher, spec.teacher_top_k, spec.temperature, views.group)
        merged = _merge(chunk, spec, kernels, views.group)
        found.student_entropy[chunk.rows], found.teacher_entropy[chunk.rows] = merged[0].entropy, merged[1].entropy
        if spec.teacher_top_k is not None:
            found.teacher_tail_mass[chunk.rows] = -torch.expm1(merged[1].log_normaliser - whole)
        arguments = (student, teacher, *merged, spec.terms, chunk.work)
        weights = row_weights[chunk.rows]
        if sums_at_once:
            sums = kernels.divergence_rows_(*arguments)
            sum_over_shards_(sums.numbers, views.group)
            gradient = LogitsGradient(spec.scale(weights, sums), spec.total(sums), chunk.dlogits)
            kernels.divergence_dlogits_(*arguments, gradient)
        else:
            wanted = LogitsGradient(spec.scale(weights, None), None, chunk.dlogits) if gradients.wanted else None
            sums = kernels.divergence_rows_(*arguments, wanted)
        found.sums.numbers[chunk.rows] = sums.numbers
    if not sums_at_once:
        sum_over_shards_(found.sums.numbers, views.group)
    return found


def _merge(
    chunk: Chunk, spec: DivergenceSpec, kernels: RowKernels, group: dist.ProcessGroup | None
) -> tuple[SoftmaxStatistics, SoftmaxStatistics]:
    """Softmax statistics of student and teacher over the whole vocabulary."""
    parts = torch.cat([kernels.statistics(logits, spec.temperature, chunk.work) for logits in chunk.logits], dim=1)
    student, teacher = gather_shards(parts, group).split(len(Statistic), dim=2)
    return merge_statistics(student), merge_statistics(teacher)


def cross_entropy(
    views: Views, labels: Tensor, temperature: float, row_weights: Tensor, gradients: Gradients, kernels: RowKernels
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and entropy of each row, [R] float64, and the gradients of the weighted sum of the first.

    Args:
        views: one.
        labels: [R] int64 vocabulary ids.
        temperature: divides the logits.
        row_weights: [R] float64.
        gradients: where the wanted ones go.
        kernels: ``torch_rows`` or ``chunk_rows``.

    Collectives: for each chunk one all_gather [C, 4] float64.
    """
    losses, entropy = torch.zeros_like(row_weights), torch.zeros_like(row_weights)
    first_id = views.shard.start
    for chunk in chunks(views, gradients, kernels.WORK_BUFFERS):
        (logits,), targets = chunk.logits, labels[chunk.rows]
        # Before the statistics, which may divide the logits in place.
        at_label = label_logits(logits, targets, first_id, temperature)
        local = torch.cat((kernels.statistics(logits, temperature, chunk.work), at_label[:, None]), dim=1)
        parts, label_parts = gather_shards(local, views.group).split((len(Statistic), 1), dim=2)
        merged = merge_statistics(parts)
        entropy[chunk.rows] = merged.entropy
        losses[chunk.rows] = merged.log_normaliser - label_parts[:, :, 0].sum(dim=0)
        if gradients.wanted:
            scale = row_weights[chunk.rows] / temperature
            kernels.cross_entropy_dlogits_(
                logits, merged, targets, first_id, temperature, scale, chunk.dlogits, chunk.work
            )
    return losses, entropy


@dataclass(frozen=True)
class Chunk:
    """One chunk of rows with its logits, in buffers that the next chunk overwrites.

    Attributes:
        rows: which rows of the R.
        logits: one [C, V_local] for each view, not divided by the temperature, without padding of the vocabulary.
        dlogits: [C, V_local], where the gradient of the first view's logits is to be written, if one is wanted; may be
            those logits themselves.
        work: [buffers, block, V_local] scratch for the row kernels.
    """

    rows: slice
    logits: tuple[Tensor, ...]
    dlogits: Tensor
    work: Tensor


def chunks(views: Views, gradients: Gradients, work_buffers: int) -> Iterator[Chunk]:
    """Walk over the rows in the largest chunks whose buffers fit the budget; none where there are no rows.

    The order matters, as in every generator here. A chunk is the caller's until it asks for the next, and by then it
    must have left the logits' gradient in ``dlogits``: the walk goes on behind its ``yield``, adds a group's part to
    ``gradients`` once the group's last chunk is done, and overwrites the buffers. So a caller takes all chunks, each to
    its end, in a plain ``for``: a list of chunks would hold the last one many times, and leaving early loses a group.

    Args:
        views: hidden states, weights and the budget.
        gradients: of the first view; may want nothing.
        work_buffers: blocks of scratch that the row kernels need.

    Returns:
        Chunks in row order, cut in the same way on all ranks of a tensor-parallel group, whose collectives pair up.

    Raises:
        UserError: not even one row fits.
    """
    total = views.num_rows
    if total == 0:
        return
    weight = views.weights[0]
    shape = scratch_shape(weight, total, len(views.hidden), work_buffers, gradients.wanted)
    plan = plan_chunks(shape, views.scratch_bytes)
    buffers = _allocate(plan, len(views.hidden), weight, views.shard.valid)
    real = views.valid_weights()
    for group in _cut(0, total, plan.group_rows):
        # Copied so that all views enter the product with the same strides and alignment: equal in, equal out.
        operands = [
            buffer[: group.stop - group.start].copy_(source[group])
            for buffer, source in zip(buffers.hidden, views.hidden, strict=True)
        ]
        dlogits = buffers.dlogits[: group.stop - group.start]
        for rows in _cut(group.start, group.stop, plan.rows):
            inside = slice(rows.start - group.start, rows.stop - group.start)
            logits = tuple(buffer[: rows.stop - rows.start] for buffer in buffers.logits)
            parts = [operand[inside] for operand in operands]
            if views.shared_weight:
                project(parts, real[0], logits, buffers.products)
            else:
                for part, own_weight, out in zip(parts, real, logits, strict=True):
                    project((part,), own_weight, (out,), buffers.products)
            yield Chunk(rows, logits, dlogits[inside], buffers.work)
        # Only now is the last chunk's part in dlogits.
        gradients.add(group, operands[0], real[0], dlogits, buffers.products)


def _cut(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


@dataclass(frozen=True)
class _Buffers:
    """Those of one walk, allocated once and reused; sizes as in ``ChunkPlan``.

    Attributes:
        hidden: one [G, H] for each view, in the dtype that enters the products.
        logits: one [C, V_valid] for each view.
        dlogits: [G, V_valid]; the first of ``logits`` where its dtype enters the products.
        work: for the row kernels.
        products: scratch of the products; None where they need none.
    """

    hidden: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    dlogits: Tensor
    work: Tensor
    products: Tensor | None


def _allocate(plan: ChunkPlan, views: int, weight: Tensor, valid: int) -> _Buffers:
    dtype, operand, device, hidden_size = compute_dtype(weight), operand_dtype(weight), weight.device, weight.shape[1]
    logits = tuple(torch.empty(plan.rows, valid, dtype=dtype, device=device) for _ in range(views))
    return _Buffers(
        hidden=tuple(torch.empty(plan.group_rows, hidden_size, dtype=operand, device=device) for _ in range(views)),
        logits=logits,
        dlogits=logits[0] if plan.in_place else torch.empty(plan.group_rows, valid, dtype=operand, device=device),
        work=torch.empty(plan.work_buffers, plan.block_rows, valid, dtype=dtype, device=device),
        products=product_scratch(weight, plan.product_rows),
    )
