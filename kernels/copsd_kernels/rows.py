"""What the row functions of the fused losses have in common: their contract, and how shards are joined.

A file of this folder is named after the value of ``loss.implementation`` that it serves and what it works on:
``torch_rows``; ``chunk_rows``; ``streaming_tiles`` and ``streaming_kernels``; ``triton_entries`` for both in Triton.

Row functions work on the logits of one chunk of rows and one shard of the vocabulary, [C, V_local], without
collectives. ``torch_rows`` (plain torch) and ``chunk_rows`` (Triton) offer the same ones, in this order of calls:

    label_logits                                       cross-entropy alone, on untouched logits
    statistics -> (gather over shards) -> merge_statistics
    divergence_rows_                                   the sums; the gradient too, where its total is known
    (sum over shards) -> divergence_dlogits_           the gradient, where its total had to be summed first
    cross_entropy_dlogits_

From ``statistics`` on, the logits belong to the row functions, which may overwrite them and keep there what a later
call needs. Logits must be finite, and padding of the vocabulary must not be among their columns.

Notation: a, b student's and teacher's logits over the temperature; x = log q, y = log p their log-softmax; u = y - x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from copsd_kernels.reference import DivergenceKind

# The maximum that a shard without columns reports: finite, so that differences of two maxima are never NaN.
NO_COLUMNS = -1e30

# Nats below its row's maximum at which a logit still counts as the largest: where it is divided by the temperature
# again, or computed again, it may differ in its last bits.
TIE = 1e-5

# From here on w e^u dominates 1 - w beyond float64, so log(1 - w + w e^u) = u + log w, and e^u still fits in float32.
MAX_JSD_LOG_RATIO = 60.0


@dataclass(frozen=True)
class DivergenceTerms:
    """The divergence of ``reference.divergence`` up to the sum over the vocabulary; the names mean the same."""

    kind: DivergenceKind
    jsd_weight: float
    temperature: float
    entry_clip: float | None

    @property
    def total_is_zero(self) -> bool:
        """Whether S (see ``divergence_rows_``) is 0 for every row, so that it need not be summed."""
        return self.kind == "forward_kl" and self.entry_clip is None


@dataclass(frozen=True)
class SoftmaxStatistics:
    """What a softmax over the whole vocabulary needs to know of each row; all [C], float64.

    Attributes:
        maximum: largest logit m, over the temperature.
        log_sum: log sum_v exp(a_v - m). Kept apart from m: logits shift by m without rounding where it matters, and
            what is left to subtract is small.
        entropy: in nats.
    """

    maximum: Tensor
    log_sum: Tensor
    entropy: Tensor

    @property
    def log_normaliser(self) -> Tensor:
        """log sum_v exp(a_v), [C] float64."""
        return self.maximum + self.log_sum


@dataclass(frozen=True)
class LogitsGradient:
    """The gradient of the weighted divergence that is wanted: scale (G - q S) for each logit.

    Attributes:
        scale: [C] float64, row weight / temperature, 0 for rows whose divergence is clipped.
        total: [C] float64, S over the whole vocabulary; None where it is 0 (``DivergenceTerms.total_is_zero``).
        out: [C, V_local], where to write it; may be the student's logits themselves.
    """

    scale: Tensor
    total: Tensor | None
    out: Tensor


def merge_statistics(parts: Tensor) -> SoftmaxStatistics:
    """Join the statistics of all shards: every rank that merges the same parts gets the same bits.

    Args:
        parts: [shards, C, 3] float64 from ``statistics``, in shard order; some shard has at least one column.

    Returns:
        Statistics of the whole vocabulary.
    """
    maximum, total, weighted = join_parts(parts).unbind(dim=-1)
    return SoftmaxStatistics(maximum, total.log(), total.log() - weighted / total)


def join_parts(parts: Tensor) -> Tensor:
    """Join the m, d, c (see ``torch_rows.statistics``) of parts of the vocabulary: [parts, C, 3] -> [C, 3], float64."""
    maxima, sums, weighted = parts.unbind(dim=-1)
    maximum = maxima.amax(dim=0)
    offset = maxima - maximum
    scale = offset.exp()
    return torch.stack((maximum, (scale * sums).sum(dim=0), (scale * (weighted + sums * offset)).sum(dim=0)), dim=-1)


def label_logits(logits: Tensor, labels: Tensor, start: int, temperature: float) -> Tensor:
    """Logit of each row's label, over the temperature, where this shard holds it, else 0: summed over shards, it.

    Args:
        logits: [C, V_local], float32 or float64, not yet seen by ``statistics``.
        labels: [C], int64 vocabulary ids.
        start: vocabulary id of the first column.
        temperature: divides the logits.

    Returns:
        [C] float64.
    """
    if logits.shape[1] == 0:
        return torch.zeros(labels.shape, dtype=torch.float64, device=logits.device)
    held, columns = local_columns(labels, start, logits.shape[1])
    return torch.where(held, logits.gather(1, columns)[:, 0] * (1 / temperature), 0).double()


def local_columns(labels: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Whether this shard holds each row's label [C], and its column [C, 1] (any valid one where it does not)."""
    local = labels - start
    return (local >= 0) & (local < width), local.clamp(0, width - 1)[:, None]
