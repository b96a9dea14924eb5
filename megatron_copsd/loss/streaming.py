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

from copsd_kernels import streaming_tiles
from copsd_kernels.gemm import compute_dtype, operand_dtype
from copsd_kernels.rows import LogitsGradient, merge_statistics
from copsd_kernels.streaming_tiles import Operand
from megatron_copsd.loss.chunked import DivergenceRows
from megatron_copsd.loss.collectives import gather_shards, sum_over_shards_
from megatron_copsd.loss.columns import plan_columns
from megatron_copsd.loss.gradients import Gradients
from megatron_copsd.loss.spec import DivergenceSpec
from megatron_copsd.loss.views import Views


def divergence(views: Views, spec: DivergenceSpec, row_weights: Tensor, gradients: Gradients) -> DivergenceRows:
    """As ``chunked.divergence``.

    Collectives: one all_gather [R, 6] and one all_reduce [R, 5], both float64; none where R is 0.

    Raises:
        UserError: the budget does not hold one column of the logits' gradient.
    """
    found = DivergenceRows.zeros(views.num_rows, row_weights.device)
    if views.num_rows == 0:
        return found
    operands = _operands(views)
    parts = gather_shards(streaming_tiles.statistics(operands, spec.temperature), views.group)
    merged = [merge_statistics(part) for part in parts.split(3, dim=2)]
    found.entropies.copy_(torch.stack([view.entropy for view in merged], dim=1))
    with_gradient = gradients.wanted and not spec.gradient_needs_sums
    if not with_gradient:
        everything = slice(0, views.shard.valid)
        found.sums.copy_(streaming_tiles.divergence(*operands, *merged, spec.terms, everything, sums=True))
        sum_over_shards_(found.sums, views.group)
    if gradients.wanted:
        scale, total = spec.scale(row_weights, found.sums), spec.total(found.sums)
        for tile in _column_tiles(views, operands[0]):
            gradient = LogitsGradient(scale, total, tile.dlogits)
            found.sums.add_(
                streaming_tiles.divergence(
                    *operands, *merged, spec.terms, tile.columns, sums=with_gradient, gradient=gradient
                )
            )
            tile.add_to(gradients, operands[0])
    if with_gradient:
        sum_over_shards_(found.sums, views.group)
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
    parts, at_label = gather_shards(local, views.group).split((3, 1), dim=2)
    merged = merge_statistics(parts)
    if gradients.wanted:
        scale = row_weights / temperature
        for tile in _column_tiles(views, operand):
            streaming_tiles.cross_entropy_dlogits(
                operand, merged, labels, first_id, temperature, scale, tile.columns, tile.dlogits
            )
            tile.add_to(gradients, operand)
    return merged.log_normaliser - at_label[:, :, 0].sum(dim=0), merged.entropy


@dataclass(frozen=True)
class _ColumnTile:
    """Some columns' part of the logits' gradient, in a buffer that the next tile overwrites.

    Attributes:
        columns: which of the V_local.
        dlogits: [R, columns].
        scratch: [rows, H] for the products; None where they need none.
    """

    columns: slice
    dlogits: Tensor
    scratch: Tensor | None

    def add_to(self, gradients: Gradients, operand: Operand) -> None:
        weight = operand.weight[self.columns]
        gradients.add_columns(self.columns, operand.hidden, weight, self.dlogits, self.scratch)


def _column_tiles(views: Views, operand: Operand) -> Iterator[_ColumnTile]:
    weight = views.weights[0]
    plan = plan_columns(views.num_rows, weight, views.scratch_bytes)
    dlogits = operand.hidden.new_empty(views.num_rows, plan.columns)
    scratch = None
    if plan.scratch_rows:
        scratch = torch.empty(plan.scratch_rows, weight.shape[1], dtype=compute_dtype(weight), device=weight.device)
    for start in range(0, views.shard.valid, plan.columns):
        columns = slice(start, min(start + plan.columns, views.shard.valid))
        yield _ColumnTile(columns, dlogits[:, : columns.stop - start], scratch)


def _operands(views: Views) -> tuple[Operand, ...]:
    dtype = operand_dtype(views.weights[0])
    weights = views.valid_weights()
    return tuple(
        Operand(hidden.to(dtype).contiguous(), weight) for hidden, weight in zip(views.hidden, weights, strict=True)
    )
