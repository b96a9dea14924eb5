"""Cross-entropy of labels over the full vocabulary, from hidden states, without the batch's logits.

``divergence`` has the map; with one view and labels it is the same walk, and no sums over the vocabulary are sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from copsd_kernels.arguments import Arguments
from megatron_copsd.loss.arguments import check_labels, check_layer, check_rows
from megatron_copsd.loss.autograd import DEFAULT_GRADIENT_OPTIONS, GradientOptions, Gradients, Views, weighted_loss
from megatron_copsd.loss.implementation import Implementation, implementation_of
from megatron_copsd.types import VocabShard


@dataclass(frozen=True)
class CrossEntropyResult:
    """The loss, and each row's log-probability and entropy; detached, [R], float32.

    Attributes:
        loss: scalar, minus the sum over rows of row_weights times token_log_probs; differentiable.
        token_log_probs: log-probability of each row's label, in nats; differentiable where gradients are recomputed.
        entropy: of each row's distribution, in nats.
    """

    loss: Tensor
    token_log_probs: Tensor
    entropy: Tensor


def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    row_weights: Tensor,
    shard: VocabShard,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    scratch_bytes: int | None = None,
    implementation: Implementation = "auto",
    gradient_options: GradientOptions = DEFAULT_GRADIENT_OPTIONS,
) -> CrossEntropyResult:
    """Weighted cross-entropy: loss = -sum_r w_r log softmax(hidden_r W^T / T)[label_r].

    With w_r the advantage over the token count this has the gradient of strictly on-policy GRPO (arXiv 2402.03300),
    whose probability ratio is 1. The gradient is made in this call, chunk by chunk; the backward pass scales it and can
    be run once (``GradientOptions.recompute`` changes both). All hidden states must be finite, also those of rows whose
    weight is 0.

    Args:
        hidden: [R, H] response rows; any strides, dtype of ``weight``. R may be 0.
        weight: [V_local, H], this rank's shard of the output weight, padding included; float32, bfloat16 (logits and
            accumulated gradients are float32 all the same) or float64.
        labels: [R] int64, in [0, V).
        row_weights: [R] float32 or float64, finite, a constant.
        shard: what the rows of ``weight`` are; ``shard.rows`` is equal on all ranks of ``group``.
        group: ranks that hold the shards of the vocabulary, in vocabulary order; all have the same R and rows. None
            where this rank holds the whole vocabulary.
        temperature: T, divides the logits.
        scratch_bytes: budget of all buffers that hold logits, their gradient or parts of the weight; None for the
            device's default.
        implementation: which way it is computed, see ``implementation.CHOICES``.
        gradient_options: where gradients go, and when they are made.

    Returns:
        Loss, log-probabilities and entropies, equal on all ranks of ``group``.

    Collectives:
        Those of ``chunked.cross_entropy`` or ``streaming.cross_entropy``, then one all_reduce [R, H] of the hidden
        states' gradient. None where R is 0. Once more in the backward pass where gradients are recomputed.

    Raises:
        UserError: an argument breaks its rule, ``scratch_bytes`` is too little, or the implementation cannot run here.
    """
    check = Arguments("fused_linear_cross_entropy")
    check_layer(check, weight, shard, group, scratch_bytes, implementation, gradient_options)
    check.tensor("hidden", hidden, "R H", (weight.dtype,))
    check_labels(check, labels, shard.vocab_size)
    check_rows(check, row_weights)
    check.number("temperature", temperature)
    labels = labels.contiguous()  # as the kernels read them
    views = Views((hidden.detach(),), (weight,), shard, group, scratch_bytes)
    walk = implementation_of(implementation, weight, scratch_bytes).cross_entropy

    def run(row_weights: Tensor, gradients: Gradients) -> tuple[Tensor, ...]:
        losses, entropy = walk(views, labels, temperature, row_weights, gradients)
        return losses, entropy.float()

    loss, (losses, entropy) = weighted_loss(run, hidden, weight, row_weights, gradient_options, group)
    return CrossEntropyResult(loss=loss, token_log_probs=-losses.float(), entropy=entropy)
