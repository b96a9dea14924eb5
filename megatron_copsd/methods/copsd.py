"""COPSD: the student's next-token distributions towards the teacher's, over the full vocabulary.

    L = sum over response rows r of  w_r * D( p_T(. | teacher prompt, y_<r) || p_S(. | student prompt, y_<r) )

arXiv 2605.09548, equation of section 4. The gradient flows through the student only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_copsd.config.method import TRAITS
from megatron_copsd.config.schema import Config
from megatron_copsd.loss.divergence import fused_linear_divergence
from megatron_copsd.loss.spec import DivergenceSpec
from megatron_copsd.methods.base import OutputHead, RowReport, plain_samples
from megatron_copsd.types import Microbatch, PromptPair, Rollout, Sample


class Copsd:
    """Full-vocabulary divergence between teacher and student on the student's own rollouts."""

    traits = TRAITS["copsd"]

    def __init__(self, config: Config) -> None:
        settings = config.loss
        self._spec = DivergenceSpec(
            kind=settings.divergence,
            jsd_weight=settings.jsd_weight,
            temperature=settings.temperature,
            entry_clip=settings.entry_clip,
            token_clip=settings.token_clip,
            teacher_top_k=settings.teacher_top_k,
        )

    def make_samples(self, pairs: Sequence[PromptPair], rollouts: Sequence[Rollout]) -> list[Sample]:
        """See ``Method``."""
        return plain_samples(pairs, rollouts)

    def row_loss(
        self, hidden: torch.Tensor, batch: Microbatch, head: OutputHead, teacher_hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor, RowReport]:
        """See ``Method``."""
        assert teacher_hidden is not None
        assert len(teacher_hidden) == len(hidden), "teacher and student disagree on the number of response rows"
        result = fused_linear_divergence(
            hidden,
            teacher_hidden,
            head.weight,
            self._spec,
            batch.row_weights.to(hidden.device),
            head.shard,
            teacher_weight=head.teacher_weight,
            group=head.group,
            scratch_bytes=head.scratch_bytes,
            implementation=head.implementation,
            gradient_options=head.gradient_options,
        )
        row_sums = {
            "divergence": result.token_divergence.sum(),
            "clipped_entry_share": result.clipped_entry_share.sum(),
            "clipped_teacher_mass": result.clipped_teacher_mass.sum(),
            "teacher_tail_mass": result.teacher_tail_mass.sum(),
            "student_entropy": result.student_entropy.sum(),
            "teacher_entropy": result.teacher_entropy.sum(),
            "top1_agreement": result.top1_agreement.sum(),
        }
        return result.loss, RowReport(result.loss.detach(), result.token_divergence, row_sums)
