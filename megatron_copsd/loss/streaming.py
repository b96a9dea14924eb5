"""The fused losses without any logits in memory: logits are made again, tile by tile, wherever they are needed.

What stays of a pass is a few numbers a row. The gradients need the logits' gradient as an operand of two products; it
exists for as many columns of the vocabulary at a time as the budget allows, for all rows, so that each part of the
weight's gradient is written once. ``chunked`` offers the same functions with fewer products and more memory.

Products with the output weight, in units of one view's logits: statistics 2, sums 2 (for ``forward_kl`` without clips
they are made with the gradient), the logits' gradient 2, hidden states' and weight's gradients 1 each: 6 or 8 in all;
for the cross-entropy 1, 1, 1 and 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from copsd_kernels.gemm import operand_dtype, product_scratch, scratch_shape
from copsd_kernels.rows import LogitsGradient, Statistic, merge_statistics
from copsd_kernels.scratch import plan_columns
from copsd_kernels.streaming import tiles as streaming_tiles
from copsd_kernels.streaming.tiles import Operand
from megatron_copsd.loss.autograd import Gradients, Views
from megatron_copsd.loss.chunked import DivergenceRows
from megatron_copsd.loss.shards import gather_shards, sum_over_shards_
from megatron_copsd.loss.spec import DivergenceSpec


def divergence(views: Views, spec: DivergenceSpec, row_weights: Tensor, gradients: Gradients) -> DivergenceRows:
    """As ``chunked.divergence``.

    Collectives: one all_gather [R, 6] and one all_reduce [R, 5], both float64; none where R is 0.

    Raises:
        UserError: the budget does not hold one column of the logits' gradient.
    """
    found = DivergenceRows.zeros(views.num_rows, row_weights.device)
    if views.num_rows == 0:
        return found
    student, teacher = _operands(views)
    parts = gather_shards(streaming_tiles.statistics((student, teacher), spec.temperature), views.group)
    student_parts, teacher_parts = parts.split(len(Statistic), dim=2)
    merged = merge_statistics(student_parts), merge_statistics(teacher_parts)
    found.student_entropy.copy_(merged[0].entropy)
    found.teacher_entropy.copy_(merged[1].entropy)
    arguments = (student, teacher, *merged, spec.terms)
    numbers = found.sums.numbers
    with_gradient = gradients.wanted and not spec.gradient_needs_sums
    if not with_gradient:
        everything = slice(0, views.shard.valid)
        numbers.copy_(streaming_tiles.divergence(*arguments, everything, sums=True).numbers)
        sum_over_shards_(numbers, views.group)
    if gradients.wanted:
        scale, total = spec.scale(row_weights, found.sums), spec.total(found.sums)
        for part in column_parts(views, student, gradients):
            gradient = LogitsGradient(scale, total, part.dlogits)
            sums = streaming_tiles.divergence(*arguments, part.columns, sums=with_gradient, gradient=gradient)
            numbers.add_(sums.numbers)
    if with_gradient:
        sum_over_shards_(numbers, views.group)
    return found


def cross_entropy(
    views: Views, labels: Tensor, temperature: float, row_weights: Tensor, gradients: Gradients
) -> tuple[Tensor, Tensor]:
    """As ``chunked.cross_entropy``.

    Collectives: one all_gather [R, 4] float64; none where R is 0.

    Raises:
        UserError: the budget does not hold one column of the logits' gradient.
    """
    if views.num_rows == 0:
        return torch.zeros_like(row_weights), torch.zeros_like(row_weights)
    (operand,), first_id = _operands(views), views.shard.start
    local = streaming_tiles.statistics((operand,), temperature, labels, first_id)
    parts, at_label = gather_shards(local, views.group).split((len(Statistic), 1), dim=2)
    merged = merge_statistics(parts)
    if gradients.wanted:
        scale = row_weights / temperature
        for part in column_parts(views, operand, gradients):
            streaming_tiles.cross_entropy_dlogits(
                operand, merged, labels, first_id, temperature, scale, part.columns, part.dlogits
            )
    return merged.log_normaliser - at_label[:, :, 0].sum(dim=0), merged.entropy


@dataclass(frozen=True)
class ColumnPart:
    """Some columns' part of the logits' gradient, in a buffer that the next part overwrites.

    Attributes:
        columns: which of the V_local.
        dlogits: [R, columns], where it is to be written.
    """

    columns: slice
    dlogits: Tensor


def column_parts(views: Views, operand: Operand, gradients: Gradients) -> Iterator[ColumnPart]:
    """Walk over the shard's columns in the largest parts whose buffers fit the budget, padding left out.

    The order matters as in ``chunked.chunks``: what the caller has left in a part's ``dlogits`` when it asks for the
    next is added to ``gradients`` behind the ``yield``, and the buffer is overwritten.

    Raises:
        UserError: not even one column fits.
    """
    weight = views.weights[0]
    shape = scratch_shape(weight, views.num_rows, len(views.hidden), work_buffers=0, differentiate=gradients.wanted)
    plan = plan_columns(shape, views.scratch_bytes)
    dlogits = operand.hidden.new_empty(views.num_rows, plan.columns)
    products = product_scratch(weight, plan.product_rows)
    for start in range(0, views.shard.valid, plan.columns):
        columns = slice(start, min(start + plan.columns, views.shard.valid))
        part = ColumnPart(columns, dlogits[:, : columns.stop - start])
        yield part
        gradients.add_columns(columns, operand.hidden, operand.weight[columns], part.dlogits, products)


def _operands(views: Views) -> tuple[Operand, ...]:
    dtype = operand_dtype(views.weights[0])
    weights = views.valid_weights()
    return tuple(
        Operand(hidden.to(dtype).contiguous(), weight) for hidden, weight in zip(views.hidden, weights, strict=True)
    )
