"""COPSD by policy gradient: the reverse divergence, at the sampled tokens alone.

    L = - sum over response rows r of  w_r * A_r * log p_S(y_r | student prompt, y_<r),
    A_r = log p_T(y_r | teacher prompt, y_<r) - log p_S(y_r | student prompt, y_<r), a constant

Of tokens sampled from the student, - A is an estimate without bias of KL(p_S || p_T), and the gradient of L one of that
divergence's at each row, with the variance of one sample (arXiv 2601.18734 compares both). What is reported is the
estimate, - sum_r w_r A_r. It is no cheaper here than the divergence itself: five products with the output weight, one
of which makes logits a second time, against four, and neither holds the vocabulary. Responses sampled with ``top_p``,
``top_k``, another temperature than the loss has or older weights are samples of something else, and the estimate is
then of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_copsd.config.method import TRAITS
from megatron_copsd.config.schema import Config
from megatron_copsd.methods.base import OutputHead, RowReport, plain_samples
from megatron_copsd.methods.likelihood import label_likelihood, likelihood_report
from megatron_copsd.types import Microbatch, PromptPair, Rollout, Sample


class SampledToken:
    """Log-likelihood of the rollouts, each token weighted with how much likelier the teacher finds it."""

    traits = TRAITS["sampled_token"]

    def __init__(self, config: Config) -> None:
        """Take the temperature of both distributions."""
        self._temperature = config.loss.temperature

    def make_samples(self, pairs: Sequence[PromptPair], rollouts: Sequence[Rollout]) -> list[Sample]:
        """See ``Method``."""
        return plain_samples(pairs, rollouts)

    def row_loss(
        self, hidden: torch.Tensor, batch: Microbatch, head: OutputHead, teacher_hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor, RowReport]:
        """See ``Method``."""
        assert teacher_hidden is not None
        assert len(teacher_hidden) == len(hidden), "teacher and student disagree on the number of response rows"
        with torch.no_grad():
            of_teacher = head if head.teacher_weight is None else replace(head, weight=head.teacher_weight)
            teacher = label_likelihood(teacher_hidden, batch, of_teacher, self._temperature).token_log_probs
        # The student's log-probabilities weight their own gradient, so each row is differentiated by itself.
        result = label_likelihood(hidden, batch, head, self._temperature, by_row=True)
        advantage = teacher - result.token_log_probs.detach()
        weights = batch.row_weights.to(advantage)
        loss = -(weights * advantage * result.token_log_probs).sum()
        estimate = -(weights * advantage).sum()
        report = likelihood_report(estimate, result, divergence=-advantage.sum())
        return loss, replace(report, token_losses=-advantage)
