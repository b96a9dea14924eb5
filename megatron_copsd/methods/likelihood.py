"""Weighted log-likelihood of responses, which supervised fine-tuning and the policy gradient share."""

from __future__ import annotations

import torch

from megatron_copsd.loss.cross_entropy import fused_linear_cross_entropy
from megatron_copsd.methods.base import OutputHead, RowReport
from megatron_copsd.types import Microbatch


def weighted_likelihood(
    hidden: torch.Tensor, batch: Microbatch, head: OutputHead, temperature: float
) -> tuple[torch.Tensor, RowReport]:
    """Return - sum_r w_r log p(label of r) over the microbatch's rows, and its report.

    Args:
        hidden: student's final hidden states at the response rows, [R, H].
        batch: the microbatch; w are its ``row_weights``.
        head: output layer.
        temperature: divides the logits.
    """
    result = fused_linear_cross_entropy(
        hidden,
        head.weight,
        batch.labels.to(hidden.device),
        batch.row_weights.to(hidden.device),
        head.shard,
        group=head.group,
        temperature=temperature,
        scratch_bytes=head.scratch_bytes,
        implementation=head.implementation,
        gradient_options=head.gradient_options,
    )
    token_losses = -result.token_log_probs
    row_sums = {"negative_log_likelihood": token_losses.sum(), "student_entropy": result.entropy.sum()}
    return result.loss, RowReport(result.loss.detach(), token_losses, row_sums)
