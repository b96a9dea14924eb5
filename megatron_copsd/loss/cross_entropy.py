"""Cross-entropy of labels over the full vocabulary, from hidden states, without the batch's logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from copsd_kernels.gemm import compute_dtype
from copsd_kernels.tiled import cross_entropy_dlogits_, label_logits, merge_statistics, statistics
from megatron_copsd.loss.chunks import DEFAULT_SCRATCH_BYTES, Chunk, Gradients, chunks, gather_shards
from megatron_copsd.types import VocabShard


@dataclass(frozen=True)
class CrossEntropyResult:
    """The loss, and each row's log-probability and entropy; both are detached, [R], float32.

    Attributes:
        loss: scalar, minus the sum over rows of row_weights times token_log_probs; differentiable.
        token_log_probs: log-probability of each row's label, in nats.
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
    scratch_bytes: int = DEFAULT_SCRATCH_BYTES,
) -> CrossEntropyResult:
    """Weighted cross-entropy: loss = -sum_r w_r log softmax(hidden_r W^T / T)[label_r].

    With w_r the advantage over the token count this has the gradient of strictly on-policy GRPO (arXiv 2402.03300),
    whose probability ratio is 1. The gradient is made in this call, chunk by chunk; the backward pass scales it and can
    be run once. All hidden states must be finite, also those of rows whose weight is 0.

    Args:
        hidden: [R, H] response rows; any strides, dtype of ``weight``. R may be 0.
        weight: [V_local, H], this rank's shard of the output weight, padding included; float32, bfloat16 (logits and
            accumulated gradients are float32 all the same) or float64.
        labels: [R] int64, in [0, V).
        row_weights: [R] float32, a constant.
        shard: what the rows of ``weight`` are; ``shard.rows`` is equal on all ranks of ``group``.
        group: ranks that hold the shards of the vocabulary, in vocabulary order; all have the same R and rows. None
            where this rank holds the whole vocabulary.
        temperature: T, divides the logits.
        scratch_bytes: budget of all buffers that hold logits or parts of the weight.

    Returns:
        Loss, log-probabilities and entropies, equal on all ranks of ``group``.

    Collectives:
        For each chunk one all_gather [C, 4] float64; at the end one all_reduce [R, H] of the hidden states' gradient.
        None where R is 0.

    Raises:
        UserError: ``scratch_bytes`` does not hold one row.
    """
    assert hidden.shape == (labels.shape[0], weight.shape[1]), f"{hidden.shape}: expected [R, H]"
    assert hidden.dtype == weight.dtype, f"{hidden.dtype} hidden states for a {weight.dtype} weight"
    assert weight.shape[0] == shard.rows, f"{weight.shape}: the shard says {shard.rows} rows"
    assert ((labels >= 0) & (labels < shard.vocab_size)).all(), "a label is not in the vocabulary"

    gradients = Gradients.zeros(hidden, weight)
    with torch.no_grad():
        walk = chunks((hidden,), (weight,), shard, temperature, scratch_bytes)
        scales = row_weights.double() / temperature
        token_log_probs, entropy = _run_chunks(walk, labels, scales, shard.start, gradients, group)
        loss = -(row_weights.double() * token_log_probs).sum().to(compute_dtype(weight))
    return CrossEntropyResult(
        loss=gradients.attach(loss, hidden, weight, group),
        token_log_probs=token_log_probs.float(),
        entropy=entropy.float(),
    )


def _run_chunks(
    walk: Iterator[Chunk],
    labels: Tensor,
    scales: Tensor,
    start: int,
    gradients: Gradients,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """For each chunk: statistics, collective, gradient of the logits, products.

    Returns:
        Log-probability of the label and entropy, each [R] float64.
    """
    token_log_probs, entropy = torch.zeros_like(scales), torch.zeros_like(scales)
    for chunk in walk:
        (logits,), targets = chunk.logits, labels[chunk.rows]
        local = statistics(logits, chunk.work), label_logits(logits, targets, start)[:, None]
        parts, label_parts = gather_shards(torch.cat(local, dim=1), group).split((3, 1), dim=2)
        merged = merge_statistics(parts)
        entropy[chunk.rows] = merged.entropy
        token_log_probs[chunk.rows] = label_parts[:, :, 0].sum(dim=0) - merged.log_normaliser
        if gradients.wanted:
            dlogits = cross_entropy_dlogits_(logits, merged, targets, start, scales[chunk.rows], chunk.work)
            gradients.add(chunk, dlogits)
    return token_log_probs, entropy
