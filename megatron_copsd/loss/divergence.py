"""Divergence between teacher and student over the full vocabulary, from hidden states, without the batch's logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron_copsd.loss.gradients import DEFAULT_GRADIENT_OPTIONS, GradientOptions, Gradients, weighted_loss
from megatron_copsd.loss.implementation import Implementation, implementation_of
from megatron_copsd.loss.spec import DivergenceSpec
from megatron_copsd.loss.views import Views
from megatron_copsd.types import VocabShard


@dataclass(frozen=True)
class DivergenceResult:
    """The loss, and what each row contributed to it; every tensor but ``loss`` is detached, [R], float32.

    Attributes:
        loss: scalar, sum over rows of row_weights times token_divergence; differentiable.
        token_divergence: in nats, after both clips; differentiable too where gradients are recomputed.
        clipped_entry_share: share of the vocabulary's entries above entry_clip.
        clipped_teacher_mass: teacher's probability on those entries.
        teacher_tail_mass: teacher's probability outside its teacher_top_k likeliest tokens; 0 without a cut.
        student_entropy: in nats, at the loss's temperature.
        teacher_entropy: in nats, at the loss's temperature.
        top1_agreement: 1 where student and teacher have a likeliest entry in common, else 0.
    """

    loss: Tensor
    token_divergence: Tensor
    clipped_entry_share: Tensor
    clipped_teacher_mass: Tensor
    teacher_tail_mass: Tensor
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
        scratch_bytes: budget of all buffers that hold logits, their gradient or parts of the weight; None for the
            device's default.
        implementation: which way it is computed, see ``implementation.CHOICES``.
        gradient_options: where gradients go, and when they are made.

    Returns:
        Loss and row diagnostics, equal on all ranks of ``group``.

    Collectives:
        Those of ``chunked.divergence`` or ``streaming.divergence``, then one all_reduce [R, H] of the hidden states'
        gradient. None where R is 0. Once more in the backward pass where gradients are recomputed.

    Raises:
        UserError: ``scratch_bytes`` is too little, or the implementation cannot run here.
    """
    views = Views(
        (student_hidden.detach(), teacher_hidden.detach()),
        (weight, weight if teacher_weight is None else teacher_weight),
        shard,
        group,
        scratch_bytes,
    )
    walk = implementation_of(implementation, weight, scratch_bytes, top_k=spec.teacher_top_k is not None).divergence

    def run(row_weights: Tensor, gradients: Gradients) -> tuple[Tensor, ...]:
        rows = walk(views, spec, row_weights, gradients)
        sums = rows.sums
        divergence = sums[:, 0] if spec.token_clip is None else sums[:, 0].clamp(max=spec.token_clip)
        clipped_entry_share, clipped_teacher_mass = sums[:, 2] / shard.vocab_size, sums[:, 3].clamp(min=0)
        top1_agreement = sums[:, 4].clamp(max=1)
        diagnostics = (clipped_entry_share, clipped_teacher_mass, rows.teacher_tail_mass, *rows.entropies.unbind(dim=1))
        return divergence.clone(), *(number.float() for number in (*diagnostics, top1_agreement))

    loss, rows_out = weighted_loss(run, student_hidden, weight, row_weights, gradient_options, group)
    return DivergenceResult(loss, rows_out[0].float(), *rows_out[1:])
