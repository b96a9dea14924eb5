"""Log-likelihood of responses: the loss of supervised fine-tuning and of the policy gradient, and its bare numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_copsd.config.schema import Config
from megatron_copsd.loss.cross_entropy import CrossEntropyResult, fused_linear_cross_entropy
from megatron_copsd.methods.base import OutputHead, RowReport
from megatron_copsd.model.build import LocalModel
from megatron_copsd.model.context import by_sample
from megatron_copsd.model.passes import forward_pass
from megatron_copsd.types import Microbatch


def label_likelihood(
    hidden: torch.Tensor, batch: Microbatch, head: OutputHead, temperature: float, *, by_row: bool = False
) -> CrossEntropyResult:
    """Return - sum_r w_r log p(label of r) over the microbatch's rows, with what it is made of.

    Args:
        hidden: student's final hidden states at the response rows, [R, H].
        batch: the microbatch; w are its ``row_weights``.
        head: output layer.
        temperature: divides the logits.
        by_row: make the rows' log-probabilities differentiable each by itself, from logits that are computed twice.
    """
    options = replace(head.gradient_options, recompute=True) if by_row else head.gradient_options
    return fused_linear_cross_entropy(
        hidden,
        head.weight,
        batch.labels.to(hidden.device),
        batch.row_weights.to(hidden.device),
        head.shard,
        group=head.group,
        temperature=temperature,
        scratch_bytes=head.scratch_bytes,
        implementation=head.implementation,
        gradient_options=options,
    )


def likelihood_report(loss: torch.Tensor, result: CrossEntropyResult, **row_sums: torch.Tensor) -> RowReport:
    """Return the report of a loss that is made of the labels' log-probabilities.

    Args:
        loss: the microbatch's share, scalar.
        result: of ``label_likelihood``.
        row_sums: further sums over the rows.
    """
    token_losses = -result.token_log_probs.detach()
    sums = {"negative_log_likelihood": token_losses.sum(), "student_entropy": result.entropy.sum()}
    return RowReport(loss.detach(), token_losses, {**sums, **row_sums})


def trainer_log_probs(
    model: LocalModel,
    ddp: Sequence[DistributedDataParallel],
    batches: Sequence[Microbatch],
    config: Config,
    temperature: float,
) -> dict[int, list[float]]:
    """Return log p(label) of every response token under the model's current weights, by sample, on every process.

    Args:
        model: the model.
        ddp: its chunks behind Megatron's buffers.
        batches: the replica's microbatches.
        config: says how the loss is computed.
        temperature: divides the logits.

    Collectives: a forward-only schedule; then those of ``by_sample``.
    """

    def log_probs(index: int, hidden: torch.Tensor) -> torch.Tensor:
        batch = batches[index]
        return fused_linear_cross_entropy(
            hidden,
            model.output_weight,
            batch.labels.to(hidden.device),
            batch.row_weights.to(hidden.device),
            model.shard,
            group=model.layout.tensor_group,
            temperature=temperature,
            implementation=config.loss.implementation,
            scratch_bytes=config.loss.scratch_bytes,
        ).token_log_probs

    return by_sample(model.layout, batches, forward_pass(ddp, batches, log_probs))
