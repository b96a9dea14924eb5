"""What a method is: how it makes a step's samples, what it is given on the last pipeline stage, what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_copsd.config.method import MethodTraits
from megatron_copsd.config.schema import Config
from megatron_copsd.loss.autograd import GradientOptions
from megatron_copsd.loss.implementation import Implementation
from megatron_copsd.model.build import LocalModel
from megatron_copsd.types import Microbatch, PromptPair, Rollout, Sample, VocabShard


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


def output_head(model: LocalModel, config: Config, teacher_weight: torch.Tensor | None) -> OutputHead:
    """Return the model's output layer as the loss takes it; only on the last stage.

    The weight's gradient goes straight into Megatron's buffer: it is as large as the weight and never exists twice.
    """
    loss = config.loss
    weight: Any = model.output_weight  # Megatron keeps the gradient in an attribute
    # Reductions that overlap start where autograd hands over a gradient, so it must see this one too.
    direct = weight.requires_grad and not config.parallel.overlap_grad_reduce
    return OutputHead(
        weight=weight,
        shard=model.shard,
        group=model.layout.tensor_group,
        teacher_weight=teacher_weight,
        gradient_options=GradientOptions(
            loss.recompute, weight.main_grad if direct else None, config.parallel.sequence
        ),
        implementation=loss.implementation,
        scratch_bytes=loss.scratch_bytes,
    )


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


class Method(Protocol):
    """How the samples of a step and their loss are made.

    Attributes:
        traits: what it needs, which settings, planner and loop go by.
    """

    traits: MethodTraits

    def make_samples(self, pairs: Sequence[PromptPair], rollouts: Sequence[Rollout]) -> list[Sample]:
        """Return the step's samples, the same on every process.

        Args:
            pairs: the drawn problems' prompts, each as often as it has responses.
            rollouts: one response each, of the engine or of the data.

        Raises:
            UserError: a problem lacks what the method needs of it.
        """
        ...

    def row_loss(
        self, hidden: torch.Tensor, batch: Microbatch, head: OutputHead, teacher_hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor, RowReport]:
        """Return a microbatch's loss (scalar, with autograd) and its report; called on the last stage.

        Args:
            hidden: student's final hidden states at the response rows, [R, H].
            batch: the microbatch; its ``row_weights`` carry the division by the global count.
            head: output layer.
            teacher_hidden: the teacher's hidden states of the same rows, [R, H]; None without a teacher.
        """
        ...


def plain_samples(pairs: Sequence[PromptPair], rollouts: Sequence[Rollout]) -> list[Sample]:
    """Return samples that all count alike."""
    return [Sample(pair, rollout, index) for index, (pair, rollout) in enumerate(zip(pairs, rollouts, strict=True))]
