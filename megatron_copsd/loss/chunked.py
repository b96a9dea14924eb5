"""The fused losses over chunks of rows, whose logits are in bounded scratch: four products with the output weight.

``streaming`` offers the same functions without any logits in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from copsd_kernels.rows import LogitsGradient, SoftmaxStatistics, label_logits, merge_statistics
from megatron_copsd.loss.chunks import Chunk, chunks
from megatron_copsd.loss.collectives import gather_shards, sum_over_shards_
from megatron_copsd.loss.gradients import Gradients
from megatron_copsd.loss.spec import DivergenceSpec
from megatron_copsd.loss.top_k import keep_top_k_
from megatron_copsd.loss.views import Views


@dataclass(frozen=True)
class DivergenceRows:
    """What a walk over all rows yields; float64.

    Attributes:
        sums: [R, 5] over the whole vocabulary, as ``torch_rows.divergence_rows_`` orders them.
        entropies: [R, 2], student's and teacher's, in nats.
        teacher_tail_mass: [R], the teacher's probability outside ``DivergenceSpec.teacher_top_k``; 0 without it.
    """

    sums: Tensor
    entropies: Tensor
    teacher_tail_mass: Tensor

    @classmethod
    def zeros(cls, rows: int, device: torch.device) -> DivergenceRows:
        """All zero, for ``rows`` rows."""
        shapes = (rows, 5), (rows, 2), (rows,)
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))


def divergence(
    views: Views, spec: DivergenceSpec, row_weights: Tensor, gradients: Gradients, rows: ModuleType
) -> DivergenceRows:
    """Row sums of the divergence between student and teacher, and the gradients of the weighted sum over rows.

    Args:
        views: student and teacher.
        spec: which divergence.
        row_weights: [R] float64.
        gradients: where the wanted ones go.
        rows: the row functions, ``torch_rows`` or ``chunk_rows``.

    Collectives: for each chunk one all_gather [C, 6] (and [C, k + 1] with ``teacher_top_k``) and, where the gradient
    needs it, one all_reduce [C, 5]; else one all_reduce [R, 5] at the end. All float64.
    """
    found = DivergenceRows.zeros(views.num_rows, row_weights.device)
    sums_at_once = gradients.wanted and spec.gradient_needs_sums
    for chunk in chunks(views, gradients, rows.WORK_BUFFERS):
        if spec.teacher_top_k is not None:
            whole = keep_top_k_(chunk.logits[1], spec.teacher_top_k, spec.temperature, views.group)
        merged = _merge(chunk, spec, rows, views.group)
        if spec.teacher_top_k is not None:
            found.teacher_tail_mass[chunk.rows] = -torch.expm1(merged[1].log_normaliser - whole)
        found.entropies[chunk.rows] = torch.stack([view.entropy for view in merged], dim=1)
        arguments = *chunk.logits, *merged, spec.terms, chunk.work
        weights = row_weights[chunk.rows]
        if sums_at_once:
            sums = sum_over_shards_(rows.divergence_rows_(*arguments), views.group)
            gradient = LogitsGradient(spec.scale(weights, sums), spec.total(sums), chunk.dlogits)
            rows.divergence_dlogits_(*arguments, gradient)
        else:
            gradient = LogitsGradient(spec.scale(weights, None), None, chunk.dlogits) if gradients.wanted else None
            sums = rows.divergence_rows_(*arguments, gradient)
        found.sums[chunk.rows] = sums
    if not sums_at_once:
        sum_over_shards_(found.sums, views.group)
    return found


def _merge(
    chunk: Chunk, spec: DivergenceSpec, rows: ModuleType, group: dist.ProcessGroup | None
) -> list[SoftmaxStatistics]:
    """Softmax statistics of each view over the whole vocabulary."""
    parts = torch.cat([rows.statistics(logits, spec.temperature, chunk.work) for logits in chunk.logits], dim=1)
    return [merge_statistics(view) for view in gather_shards(parts, group).split(3, dim=2)]


def cross_entropy(
    views: Views, labels: Tensor, temperature: float, row_weights: Tensor, gradients: Gradients, rows: ModuleType
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and entropy of each row, [R] float64, and the gradients of the weighted sum of the first.

    Args:
        views: one.
        labels: [R] int64 vocabulary ids.
        temperature: divides the logits.
        row_weights: [R] float64.
        gradients: where the wanted ones go.
        rows: the row functions, ``torch_rows`` or ``chunk_rows``.

    Collectives: for each chunk one all_gather [C, 4] float64.
    """
    losses, entropy = torch.zeros_like(row_weights), torch.zeros_like(row_weights)
    first_id = views.shard.start
    for chunk in chunks(views, gradients, rows.WORK_BUFFERS):
        (logits,), targets = chunk.logits, labels[chunk.rows]
        at_label = label_logits(logits, targets, first_id, temperature)
        local = torch.cat((rows.statistics(logits, temperature, chunk.work), at_label[:, None]), dim=1)
        parts, label_parts = gather_shards(local, views.group).split((3, 1), dim=2)
        merged = merge_statistics(parts)
        entropy[chunk.rows] = merged.entropy
        losses[chunk.rows] = merged.log_normaliser - label_parts[:, :, 0].sum(dim=0)
        if gradients.wanted:
            scale = row_weights[chunk.rows] / temperature
            rows.cross_entropy_dlogits_(
                logits, merged, targets, first_id, temperature, scale, chunk.dlogits, chunk.work
            )
    return losses, entropy
