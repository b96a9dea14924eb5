"""What every objective is given on the last pipeline stage, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_copsd.loss.gradients import GradientOptions
from megatron_copsd.loss.implementation import Implementation
from megatron_copsd.types import Microbatch, VocabShard


@dataclass(frozen=True)
class OutputHead:
    """The output layer as the fused losses take it: weights and their place, never logits.

    Attributes:
        weight: this rank's shard of the output weight, [V_local, H].
        shard: which vocabulary entries it holds.
        group: tensor-parallel group over which the vocabulary is cut.
        teacher_weight: the teacher's shard where it differs from the student's.
        gradient_options: where the gradients of weight and hidden states go, and when they are made.
        implementation: of the loss's row kernels.
        scratch_bytes: budget of the logits scratch; None for the device's default.
    """

    weight: torch.Tensor
    shard: VocabShard
    group: dist.ProcessGroup
    teacher_weight: torch.Tensor | None
    gradient_options: GradientOptions
    implementation: Implementation
    scratch_bytes: int | None


@dataclass(frozen=True)
class RowReport:
    """Detached numbers of one microbatch.

    Attributes:
        loss: the microbatch's share of the global loss, scalar.
        token_losses: [R], the divergence or negative log-likelihood of each response token.
        row_sums: named sums over the microbatch's rows; divided by the global row count they are means.
    """

    loss: torch.Tensor
    token_losses: torch.Tensor
    row_sums: Mapping[str, torch.Tensor]


class Objective(Protocol):
    """Turns response rows into a loss."""

    uses_teacher: bool

    def __call__(
        self, hidden: torch.Tensor, batch: Microbatch, head: OutputHead, teacher_hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor, RowReport]:
        """Return the microbatch's loss (scalar, with autograd) and its report.

        Args:
            hidden: student's final hidden states at the response rows, [R, H].
            batch: the microbatch; its ``row_weights`` carry the division by the global count.
            head: output layer.
            teacher_hidden: the teacher's hidden states of the same rows, [R, H]; None without a teacher.
        """
        ...
