"""Divergence between teacher and student over the full vocabulary, from hidden states, without the batch's logits.

The map of the folder: kernel, collective, kernel. ``cross_entropy`` is the other entry, to the same functions for one
view. R rows, chunks of C of them, H hidden size, V_local columns of this rank's shard; what ranks send is float64 but
for the last line, whatever the dtype of the model.

    methods/copsd.py     hidden states [R, H] of both views, this rank's [V_local, H] of the output weight, row weights
      |
    divergence.py        asks implementation.py for the walk; names what comes back of each row
    autograd.py          runs the walk now, or again in the backward pass; hands the gradients to autograd
      |
      |  a walk         chunked.py, for each chunk of rows                streaming.py, for all rows at once
      |  -----------------------------------------------------------------------------------------------------------
      |  kernel         gemm.project: logits [C, V_local] of each view
      |  kernel         RowKernels.statistics: [C, 3] of each             tiles.statistics: [R, 3] of each
      |  collective     all_gather [C, 6] (shards.gather_shards)          all_gather [R, 6]
      |                 rows.merge_statistics, on every rank the same
      |  kernel         RowKernels.divergence_rows_: sums [C, 5]          tiles.divergence: sums [R, 5]
      |  collective     all_reduce [C, 5] (shards.sum_over_shards_)       all_reduce [R, 5]
      |  kernel         RowKernels.divergence_dlogits_: [C, V_local]      tiles.divergence: [R, columns]
      |  kernel         gemm, for each group of chunks: its rows of       gemm, for each part of the columns: its rows
      |                 the hidden states' gradient, the weight's         of the weight's gradient, the hidden states'
      |
    autograd.py          collective: all_reduce [R, H] of the hidden states' gradient, float32 (``Gradients.finish``)

Where the gradient needs no sum over the vocabulary (``DivergenceSpec.gradient_needs_sums``), sums and gradient are made
by one kernel, and the sums are reduced once, at the end. RowKernels is ``torch_rows`` or ``chunk_rows``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from copsd_kernels.arguments import Arguments
from megatron_copsd.loss.arguments import check_layer, check_rows, check_spec
from megatron_copsd.loss.autograd import DEFAULT_GRADIENT_OPTIONS, GradientOptions, Gradients, Views, weighted_loss
from megatron_copsd.loss.implementation import Implementation, implementation_of
from megatron_copsd.loss.spec import DivergenceSpec
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
        row_weights: [R] float32 or float64, finite, a constant; the division by the global token count is in them.
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
        UserError: an argument breaks its rule, ``scratch_bytes`` is too little, or the implementation cannot run here.
    """
    check = Arguments("fused_linear_divergence")
    check_layer(check, weight, shard, group, scratch_bytes, implementation, gradient_options)
    check.tensor("student_hidden", student_hidden, "R H", (weight.dtype,))
    check.tensor("teacher_hidden", teacher_hidden, "R H", (weight.dtype,))
    if teacher_weight is not None:
        check.tensor("teacher_weight", teacher_weight, "V_local H", (weight.dtype,))
    check_spec(check, spec, shard.vocab_size)
    check_rows(check, row_weights)
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
        divergence = sums.divergence if spec.token_clip is None else sums.divergence.clamp(max=spec.token_clip)
        diagnostics = (
            sums.clipped_entries / shard.vocab_size,
            sums.clipped_teacher_mass.clamp(min=0),  # in torch_rows a difference of rounded sums
            rows.teacher_tail_mass,
            rows.student_entropy,
            rows.teacher_entropy,
            sums.top1_agreement.clamp(max=1),  # equal entries may lie on several shards
        )
        return divergence.clone(), *(number.float() for number in diagnostics)

    loss, rows_out = weighted_loss(run, student_hidden, weight, row_weights, gradient_options, group)
    return DivergenceResult(loss, rows_out[0].float(), *rows_out[1:])
