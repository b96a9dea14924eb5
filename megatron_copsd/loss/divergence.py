"""Divergence between teacher and student over the full vocabulary, from hidden states, without the batch's logits."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from copsd_kernels.reference import DivergenceKind
from copsd_kernels.rows import DivergenceTerms, LogitsGradient, SoftmaxStatistics, merge_statistics
from megatron_copsd.errors import UserError, describe
from megatron_copsd.loss.chunks import Chunk, chunks
from megatron_copsd.loss.collectives import gather_shards, sum_over_shards_
from megatron_copsd.loss.gradients import DEFAULT_GRADIENT_OPTIONS, GradientOptions, Gradients, weighted_loss
from megatron_copsd.loss.implementation import Implementation, row_functions
from megatron_copsd.types import VocabShard


@dataclass(frozen=True)
class DivergenceSpec:
    """Which divergence; the equations are those of ``copsd_kernels.reference.divergence``.

    Attributes:
        kind: forward_kl is KL(teacher||student), reverse_kl is KL(student||teacher), jsd lies between.
        jsd_weight: weight of the teacher in the mixture of jsd, in (0, 1).
        temperature: divides the logits of both; there is no temperature**2 factor.
        entry_clip: cap in nats of each vocabulary entry's contribution, before the sum.
        token_clip: cap in nats of a row's divergence, after the sum.

    Raises:
        UserError: a value is out of range.
    """

    kind: DivergenceKind = "forward_kl"
    jsd_weight: float = 0.5
    temperature: float = 1.0
    entry_clip: float | None = None
    token_clip: float | None = None

    def __post_init__(self) -> None:
        kinds = ("forward_kl", "reverse_kl", "jsd")
        positive = "must be a positive number"
        for name, valid, rule in (
            ("divergence", self.kind in kinds, f"must be one of {', '.join(kinds)}"),
            ("jsd_weight", 0 < self.jsd_weight < 1, "must be a number between 0 and 1, both excluded"),
            ("temperature", self.temperature > 0, positive),
            ("entry_clip", self.entry_clip is None or self.entry_clip > 0, f"{positive} or null"),
            ("token_clip", self.token_clip is None or self.token_clip > 0, f"{positive} or null"),
        ):
            if not valid:
                value = self.kind if name == "divergence" else getattr(self, name)
                raise UserError(describe(f"loss.{name}", value, rule, "Change the setting."))

    @property
    def terms(self) -> DivergenceTerms:
        """What concerns the sum over the vocabulary."""
        return DivergenceTerms(self.kind, self.jsd_weight, self.temperature, self.entry_clip)

    @property
    def gradient_needs_sums(self) -> bool:
        """Whether a row's gradient depends on sums over the whole vocabulary besides the softmax normalisers."""
        return not self.terms.total_is_zero or self.token_clip is not None


@dataclass(frozen=True)
class DivergenceResult:
    """The loss, and what each row contributed to it; every tensor but ``loss`` is detached, [R], float32.

    Attributes:
        loss: scalar, sum over rows of row_weights times token_divergence; differentiable.
        token_divergence: in nats, after both clips; differentiable too where gradients are recomputed.
        clipped_entry_share: share of the vocabulary's entries above entry_clip.
        clipped_teacher_mass: teacher's probability on those entries.
        student_entropy: in nats, at the loss's temperature.
        teacher_entropy: in nats, at the loss's temperature.
        top1_agreement: 1 where student and teacher have a likeliest entry in common, else 0.
    """

    loss: Tensor
    token_divergence: Tensor
    clipped_entry_share: Tensor
    clipped_teacher_mass: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    top1_agreement: Tensor


def fused_linear_divergence(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    spec: DivergenceSpec,
    row_weights: Tensor,
    shard: VocabShard,
    *,
    teacher_weight: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    scratch_bytes: int | None = None,
    implementation: Implementation = "auto",
    gradient_options: GradientOptions = DEFAULT_GRADIENT_OPTIONS,
) -> DivergenceResult:
    """Weighted sum of row divergences between softmax(teacher_hidden W^T / T) and softmax(student_hidden W^T / T).

    The gradient is made in this call, chunk by chunk; the backward pass scales it and can be run once
    (``GradientOptions.recompute`` changes both). The teacher gets none, neither through its hidden states nor through
    a weight it shares with the student. Where both views' hidden states and weights are equal, loss and gradients are
    exactly 0. All hidden states must be finite: a row weight of 0 gives a row of zero gradient, but does not hide NaN.

    Args:
        student_hidden: [R, H] response rows; any strides, dtype of ``weight``. R may be 0.
        teacher_hidden: [R, H], same dtype; a constant.
        weight: [V_local, H], this rank's shard of the output weight, padding included; float32, bfloat16 (logits and
            accumulated gradients are float32 all the same) or float64.
        spec: which divergence.
        row_weights: [R] float32, a constant; the division by the global token count is in them.
        shard: what the rows of ``weight`` are; ``shard.rows`` is equal on all ranks of ``group``.
        teacher_weight: [V_local, H] of the teacher where it differs from ``weight``; a constant.
        group: ranks that hold the shards of the vocabulary, in vocabulary order; all have the same R, hidden states
            and row weights. None where this rank holds the whole vocabulary.
        scratch_bytes: budget of all buffers that hold logits or parts of the weight; None for the device's default.
        implementation: of the row functions.
        gradient_options: where gradients go, and when they are made.

    Returns:
        Loss and row diagnostics, equal on all ranks of ``group``.

    Collectives:
        For each chunk one all_gather [C, 6] float64, and one all_reduce [C, 5] float64 where the gradient needs it; at
        the end one all_reduce [R, H] of the hidden states' gradient, and of what was not reduced for each chunk. None
        where R is 0. Once more in the backward pass where gradients are recomputed.

    Raises:
        UserError: ``scratch_bytes`` does not hold one row, or the implementation cannot run here.
    """
    for hidden in (student_hidden, teacher_hidden):
        assert hidden.shape == (row_weights.shape[0], weight.shape[1]), f"{hidden.shape}: expected [R, H]"
        assert hidden.dtype == weight.dtype, f"{hidden.dtype} hidden states for a {weight.dtype} weight"
    assert weight.shape[0] == shard.rows, f"{weight.shape}: the shard says {shard.rows} rows"
    rows = row_functions(implementation, weight)
    hidden = student_hidden.detach(), teacher_hidden.detach()
    weights = weight, weight if teacher_weight is None else teacher_weight

    def run(row_weights: Tensor, gradients: Gradients) -> tuple[Tensor, ...]:
        walk = chunks(hidden, weights, shard, gradients, rows.WORK_BUFFERS, scratch_bytes)
        sums, entropies = row_weights.new_zeros(len(row_weights), 5), row_weights.new_zeros(len(row_weights), 2)
        for chunk in walk:
            merged = _merge(chunk, spec, rows, group)
            entropies[chunk.rows] = torch.stack([view.entropy for view in merged], dim=1)
            sums[chunk.rows] = _finish_chunk(chunk, merged, spec, rows, row_weights[chunk.rows], gradients, group)
        if not _sums_each_chunk(spec, gradients):
            sum_over_shards_(sums, group)
        divergence = sums[:, 0] if spec.token_clip is None else sums[:, 0].clamp(max=spec.token_clip)
        clipped_entry_share, clipped_teacher_mass = sums[:, 2] / shard.vocab_size, sums[:, 3].clamp(min=0)
        diagnostics = (clipped_entry_share, clipped_teacher_mass, *entropies.unbind(dim=1), sums[:, 4].clamp(max=1))
        return divergence.clone(), *(number.float() for number in diagnostics)

    loss, rows_out = weighted_loss(run, student_hidden, weight, row_weights, gradient_options, group)
    return DivergenceResult(loss, rows_out[0].float(), *rows_out[1:])


def _merge(
    chunk: Chunk, spec: DivergenceSpec, rows: ModuleType, group: dist.ProcessGroup | None
) -> list[SoftmaxStatistics]:
    """Softmax statistics of each view over the whole vocabulary.

    Collectives: one all_gather [C, 6] float64 over ``group``.
    """
    parts = torch.cat([rows.statistics(logits, spec.temperature, chunk.work) for logits in chunk.logits], dim=1)
    return [merge_statistics(view) for view in gather_shards(parts, group).split(3, dim=2)]


def _sums_each_chunk(spec: DivergenceSpec, gradients: Gradients) -> bool:
    """Whether the sums of a chunk are needed at once; else they are only reported, and added up over shards once."""
    return gradients.wanted and spec.gradient_needs_sums


def _finish_chunk(
    chunk: Chunk,
    merged: list[SoftmaxStatistics],
    spec: DivergenceSpec,
    rows: ModuleType,
    row_weights: Tensor,
    gradients: Gradients,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Sums [C, 5] over the vocabulary as ``divergence_rows_`` orders them, and the logits' gradient where wanted.

    Collectives: one all_reduce [C, 5] float64 over ``group`` where the gradient needs it.
    """
    arguments = *chunk.logits, *merged, spec.terms, chunk.work
    scale = row_weights / spec.temperature
    if not _sums_each_chunk(spec, gradients):
        gradient = LogitsGradient(scale, None, chunk.dlogits) if gradients.wanted else None
        return rows.divergence_rows_(*arguments, gradient)
    sums = sum_over_shards_(rows.divergence_rows_(*arguments), group)
    if spec.token_clip is not None:
        scale = torch.where(sums[:, 0] <= spec.token_clip, scale, 0)
    total = None if spec.terms.total_is_zero else sums[:, 1].contiguous()
    rows.divergence_dlogits_(*arguments, LogitsGradient(scale, total, chunk.dlogits))
    return sums
