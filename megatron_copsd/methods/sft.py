"""Supervised fine-tuning on the data's reference solutions.

L = - sum over response rows r of  w_r * log p_S(y_r | student prompt, y_<r),    w_r = 1 / number of rows
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_copsd.config.method import TRAITS
from megatron_copsd.config.schema import Config
from megatron_copsd.methods.base import OutputHead, RowReport, plain_samples
from megatron_copsd.methods.likelihood import label_likelihood, likelihood_report
from megatron_copsd.types import Microbatch, PromptPair, Rollout, Sample


class Sft:
    """Negative log-likelihood of the reference solutions."""

    traits = TRAITS["sft"]

    def __init__(self, config: Config) -> None:
        """Nothing of the configuration is needed."""

    def make_samples(self, pairs: Sequence[PromptPair], rollouts: Sequence[Rollout]) -> list[Sample]:
        """See ``Method``."""
        return plain_samples(pairs, rollouts)

    def row_loss(
        self, hidden: torch.Tensor, batch: Microbatch, head: OutputHead, teacher_hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor, RowReport]:
        """See ``Method``."""
        result = label_likelihood(hidden, batch, head, temperature=1.0)
        return result.loss, likelihood_report(result.loss, result)
