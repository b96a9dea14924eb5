"""GRPO (arXiv 2402.03300): the policy gradient of rewards that are compared among the responses to a prompt.

    L = - sum over response rows r of  w_r * min(q_r A, clip(q_r, 1 - low, 1 + high) A),    A of r's response,
    q_r = p_S(y_r | student prompt, y_<r) / p(y_r) of the policy that sampled y_r

With one optimiser step a batch of fresh rollouts (``policy.ratio: one``) q is exactly 1 and its clipping never acts:
the gradient is that of - sum_r w_r A log p_S(y_r), which needs no logits a second time, and what is reported is the
surrogate, - sum_r w_r A. Otherwise (``sampled``) q is taken against the engine's own log-probabilities, so that it
corrects for weights that were older and for an engine that computes otherwise, and it is clipped as equation 3 does,
with a bound of its own above (arXiv 2503.14476).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from megatron_copsd.config.method import TRAITS
from megatron_copsd.config.schema import Config
from megatron_copsd.grading.answers import reward
from megatron_copsd.methods.base import OutputHead, RowReport
from megatron_copsd.methods.likelihood import label_likelihood, likelihood_report
from megatron_copsd.types import Microbatch, PromptPair, Rollout, Sample


class Grpo:
    """The clipped surrogate of the rollouts' advantages."""

    traits = TRAITS["grpo"]

    def __init__(self, config: Config) -> None:
        """Take the group size, and the temperature that was sampled with: the policy is that distribution."""
        self._group_size = config.rollout.samples_per_prompt
        self._temperature = config.rollout.temperature
        self._policy = config.policy

    def make_samples(self, pairs: Sequence[PromptPair], rollouts: Sequence[Rollout]) -> list[Sample]:
        """See ``Method``."""
        rewards = [reward(rollout.text, pair.problem.answer) for pair, rollout in zip(pairs, rollouts, strict=True)]
        advantages = group_advantages(rewards, self._group_size, self._policy.advantage)
        parts = zip(pairs, rollouts, advantages, rewards, strict=True)
        return [Sample(pair, rollout, i, advantage, r) for i, (pair, rollout, advantage, r) in enumerate(parts)]

    def row_loss(
        self, hidden: torch.Tensor, batch: Microbatch, head: OutputHead, teacher_hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor, RowReport]:
        """See ``Method``."""
        by_row = self._policy.ratio == "sampled"
        result = label_likelihood(hidden, batch, head, self._temperature, by_row=by_row)
        # row_weights carry the advantage, and with it its sign.
        weights = batch.row_weights.to(result.token_log_probs)
        if not by_row:
            # What is not finite in the loss stays so in the surrogate.
            surrogate = 0 * result.loss.detach() - weights.sum()
            return result.loss, replace(likelihood_report(result.loss, result), loss=surrogate)
        ratio = (result.token_log_probs - batch.sampled_log_probs.to(result.token_log_probs)).exp()
        clipped = ratio.clamp(1 - self._policy.clip_low, 1 + self._policy.clip_high)
        loss = -torch.minimum(weights * ratio, weights * clipped).sum()
        held = (weights * clipped < weights * ratio).sum().to(ratio)
        return loss, likelihood_report(loss, result, importance_ratio=ratio.detach().sum(), clipped_ratio_share=held)


def group_advantages(
    rewards: Sequence[float],
    group_size: int,
    kind: Literal["standardized", "centered", "reward"] = "standardized",
) -> list[float]:
    """Return what each response's reward is worth within its group of ``group_size`` samples of one prompt.

    standardized: A = (r - mean) / (std + 1e-6), arXiv 2402.03300 equation 3, with the sample standard deviation, as the
    libraries of the field take it; centered: r - mean (Dr. GRPO, arXiv 2503.20783), which does not favour groups that
    nearly all agree; reward: r. A group whose rewards are all equal teaches nothing and gets 0 but for the last.
    """
    if kind == "reward":
        return list(rewards)
    advantages: list[float] = []
    for start in range(0, len(rewards), group_size):
        group = torch.tensor(rewards[start : start + group_size], dtype=torch.float64)
        centered = group - group.mean()
        advantages += (centered if kind == "centered" else centered / (group.std() + 1e-6)).tolist()
    return advantages
