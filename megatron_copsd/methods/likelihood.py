"""Weighted log-likelihood of the response: supervised fine-tuning, and the policy gradient of GRPO.

    L = - sum over response rows r of  w_r * log p_S(y_r | student prompt, y_<r)

For ``sft`` the weights are 1/N. For ``grpo`` (arXiv 2402.03300) they carry the response's advantage as well: with one
optimiser step a batch of fresh rollouts the importance ratio is exactly 1, its clipping never acts, and the gradient of
the GRPO surrogate is the gradient of this loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_copsd.loss.cross_entropy import fused_linear_cross_entropy
from megatron_copsd.methods.base import OutputHead, RowReport
from megatron_copsd.types import Microbatch


class WeightedLikelihood:
    """Negative log-likelihood of the responses under the rows' weights."""

    uses_teacher = False

    def __init__(self, temperature: float) -> None:
        """``temperature`` divides the logits: GRPO's policy is the distribution that was sampled from."""
        self._temperature = temperature

    def __call__(
        self, hidden: torch.Tensor, batch: Microbatch, head: OutputHead, teacher_hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor, RowReport]:
        """See ``Objective``."""
        result = fused_linear_cross_entropy(
            hidden,
            head.weight,
            batch.labels.to(hidden.device),
            batch.row_weights.to(hidden.device),
            head.shard,
            group=head.group,
            temperature=self._temperature,
            scratch_bytes=head.scratch_bytes,
            implementation=head.implementation,
            gradient_options=head.gradient_options,
        )
        token_losses = -result.token_log_probs
        row_sums = {"negative_log_likelihood": token_losses.sum(), "student_entropy": result.entropy.sum()}
        return result.loss, RowReport(result.loss.detach(), token_losses, row_sums)


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
