"""Divergence between teacher and student over the full vocabulary, from hidden states, without the batch's logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from copsd_kernels.gemm import compute_dtype
from copsd_kernels.reference import DivergenceKind
from copsd_kernels.tiled import divergence_dlogits_, divergence_rows_, merge_statistics, statistics
from megatron_copsd.errors import UserError, describe
from megatron_copsd.loss.chunks import (
    DEFAULT_SCRATCH_BYTES,
    Chunk,
    Gradients,
    chunks,
    gather_shards,
    sum_over_shards_,
)
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
    def gradient_needs_sums(self) -> bool:
        """Whether a row's gradient depends on sums over the whole vocabulary besides the softmax normalisers."""
        return self.kind != "forward_kl" or self.entry_clip is not None or self.token_clip is not None


@dataclass(frozen=True)
class DivergenceResult:
    """The loss, and what each row contributed to it; every tensor but ``loss`` is detached, [R], float32.

    Attributes:
        loss: scalar, sum over rows of row_weights times token_divergence; differentiable.
        token_divergence: in nats, after both clips.
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
    scratch_bytes: int = DEFAULT_SCRATCH_BYTES,
) -> DivergenceResult:
    """Weighted sum of row divergences between softmax(teacher_hidden W^T / T) and softmax(student_hidden W^T / T).

    The gradient is made in this call, chunk by chunk; the backward pass scales it and can be run once. The teacher
    gets none, neither through its hidden states nor through a weight it shares with the student. Where both views'
    hidden states and weights are equal, loss and gradients are exactly 0. All hidden states must be finite: a row
    weight of 0 gives a row of zero gradient, but does not hide NaN.

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
        scratch_bytes: budget of all buffers that hold logits or parts of the weight.

    Returns:
        Loss and row diagnostics, equal on all ranks of ``group``.

    Collectives:
        For each chunk one all_gather [C, 6] float64, and one all_reduce [C, 5] float64 where the gradient needs it; at
        the end one all_reduce [R, H] of the hidden states' gradient, and of what was not reduced for each chunk. None
        where R is 0.

    Raises:
        UserError: ``scratch_bytes`` does not hold one row.
    """
    for hidden in (student_hidden, teacher_hidden):
        assert hidden.shape == (row_weights.shape[0], weight.shape[1]), f"{hidden.shape}: expected [R, H]"
        assert hidden.dtype == weight.dtype, f"{hidden.dtype} hidden states for a {weight.dtype} weight"
    assert weight.shape[0] == shard.rows, f"{weight.shape}: the shard says {shard.rows} rows"

    gradients = Gradients.zeros(student_hidden, weight)
    with torch.no_grad():
        weights = (weight, weight if teacher_weight is None else teacher_weight)
        walk = chunks((student_hidden, teacher_hidden), weights, shard, spec.temperature, scratch_bytes)
        sums, entropies = _run_chunks(walk, spec, row_weights.double(), gradients, group)
        divergence, _, clipped_entries, clipped_teacher_mass, agreement = sums.unbind(dim=1)
        if spec.token_clip is not None:
            divergence = divergence.clamp(max=spec.token_clip)
        loss = (row_weights.double() * divergence).sum().to(compute_dtype(weight))
    return DivergenceResult(
        loss=gradients.attach(loss, student_hidden, weight, group),
        token_divergence=divergence.float(),
        clipped_entry_share=(clipped_entries / shard.vocab_size).float(),
        clipped_teacher_mass=clipped_teacher_mass.clamp(min=0).float(),
        student_entropy=entropies[:, 0].float(),
        teacher_entropy=entropies[:, 1].float(),
        top1_agreement=agreement.clamp(max=1).float(),
    )


def _run_chunks(
    walk: Iterator[Chunk],
    spec: DivergenceSpec,
    row_weights: Tensor,
    gradients: Gradients,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """For each chunk: statistics, collective, entries, collective, gradient of the logits, products.

    Returns:
        Sums [R, 5] over the vocabulary as ``divergence_rows_`` orders them, and entropies [R, 2]; both float64.
    """
    sums, entropies = row_weights.new_zeros(len(row_weights), 5), row_weights.new_zeros(len(row_weights), 2)
    # The gradient of an unclipped forward_kl needs the normalisers alone: its sums, only reported, are added up once.
    reduce_chunks = gradients.wanted and spec.gradient_needs_sums
    for chunk in walk:
        student, teacher = chunk.logits
        parts = torch.cat((statistics(student, chunk.work), statistics(teacher, chunk.work)), dim=1)
        merged = [merge_statistics(view) for view in gather_shards(parts, group).split(3, dim=2)]
        entropies[chunk.rows] = torch.stack([view.entropy for view in merged], dim=1)
        chunk_sums = sums[chunk.rows]
        chunk_sums.copy_(
            divergence_rows_(student, teacher, *merged, spec.kind, spec.jsd_weight, spec.entry_clip, chunk.work)
        )
        if reduce_chunks:
            sum_over_shards_(chunk_sums, group)
        if gradients.wanted:
            scale = row_weights[chunk.rows] / spec.temperature
            if spec.token_clip is not None:
                scale = torch.where(chunk_sums[:, 0] <= spec.token_clip, scale, 0)
            dlogits = divergence_dlogits_(student, teacher, chunk_sums[:, 1], scale, chunk.work)
            gradients.add(chunk, dlogits)
    if not reduce_chunks:
        sum_over_shards_(sums, group)
    return sums, entropies
