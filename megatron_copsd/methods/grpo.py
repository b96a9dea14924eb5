"""GRPO (arXiv 2402.03300): the policy gradient of rewards that are compared among the responses to a prompt.

    L = - sum over response rows r of  w_r * A(response of r) * log p_S(y_r | student prompt, y_<r)

With one optimiser step a batch of fresh rollouts the importance ratio is exactly 1, its clipping never acts, and the
gradient of the GRPO surrogate is the gradient of this loss. What is reported is the surrogate: - sum_r w_r * A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_copsd.config.method import TRAITS
from megatron_copsd.config.schema import Config
from megatron_copsd.grading.answers import reward
from megatron_copsd.methods.base import OutputHead, RowReport
from megatron_copsd.methods.likelihood import weighted_likelihood
from megatron_copsd.types import Microbatch, PromptPair, Rollout, Sample


class Grpo:
    """Log-likelihood of the rollouts, weighted with their advantages."""

    traits = TRAITS["grpo"]

    def __init__(self, config: Config) -> None:
        """Take the group size, and the temperature that was sampled with: the policy is that distribution."""
        self._group_size = config.rollout.samples_per_prompt
        self._temperature = config.rollout.temperature

    def make_samples(self, pairs: Sequence[PromptPair], rollouts: Sequence[Rollout]) -> list[Sample]:
        """See ``Method``."""
        rewards = [reward(rollout.text, pair.problem.answer) for pair, rollout in zip(pairs, rollouts, strict=True)]
        advantages = group_advantages(rewards, self._group_size)
        parts = zip(pairs, rollouts, advantages, rewards, strict=True)
        return [Sample(pair, rollout, i, advantage, r) for i, (pair, rollout, advantage, r) in enumerate(parts)]

    def row_loss(
        self, hidden: torch.Tensor, batch: Microbatch, head: OutputHead, teacher_hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor, RowReport]:
        """See ``Method``."""
        loss, report = weighted_likelihood(hidden, batch, head, self._temperature)
        # row_weights carry the advantage. What is not finite in the loss stays so in the surrogate.
        surrogate = 0 * report.loss - batch.row_weights.sum().to(report.loss)
        return loss, replace(report, loss=surrogate)


def group_advantages(rewards: Sequence[float], group_size: int) -> list[float]:
    """Return each response's reward standardised within its group of ``group_size`` samples of one prompt.

    A = (r - mean) / (std + 1e-6), arXiv 2402.03300 equation 3; a group whose rewards are all equal teaches nothing and
    gets 0.
    """
    advantages: list[float] = []
    for start in range(0, len(rewards), group_size):
        group = torch.tensor(rewards[start : start + group_size], dtype=torch.float64)
        advantages += ((group - group.mean()) / (group.std(correction=0) + 1e-6)).tolist()
    return advantages
