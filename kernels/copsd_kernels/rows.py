"""What the kernels of all implementations have in common: names, contract, and how shards are joined.

A file of this folder is named after the value of ``loss.implementation`` that it serves and what it works on:

    torch_rows           ``torch``      rows of a chunk's logits, in plain torch
    chunk_rows           ``chunk``      the same rows, in Triton
    streaming/tiles      ``streaming``  tiles of logits that never leave the registers: what is launched, how it is cut
    streaming/kernels    ``streaming``  the same tiles: the kernels
    triton_entries       entries of a divergence and what kernels store, for both that are in Triton
    rows, gemm, scratch  this contract, products with the output weight, sizes of buffers: for all
    reference            the oracle that all are tested against
    arguments            what is checked of what they are called with; row_arguments, of the row kernels

A *chunk* is rows whose logits are in memory at once, a *group* the chunks that share the products behind them, a
*block* what one elementwise operation of ``torch`` or one program of ``chunk`` holds; *tiles* are streaming's alone.

Notation: a, b student's and teacher's logits over the temperature; x = log q, y = log p their log-softmax; u = y - x.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from copsd_kernels.arguments import EXACT, Arguments
from copsd_kernels.reference import DivergenceKind

# The maximum that a shard without columns reports: finite, so that differences of two maxima are never NaN.
NO_COLUMNS = -1e30

# Nats below its row's maximum at which a logit still counts as the largest: where it is divided by the temperature
# again, or computed again, it may differ in its last bits.
TIE = 1e-5

# From here on w e^u dominates 1 - w beyond float64, so log(1 - w + w e^u) = u + log w, and e^u still fits in float32.
MAX_JSD_LOG_RATIO = 60.0


class Statistic(IntEnum):
    """Columns of a part of the softmax statistics, that of a shard or of some of its columns.

    MAXIMUM is m = max a, SUM is d = sum exp(a - m), WEIGHTED_SUM is c = sum exp(a - m) (a - m).
    """

    MAXIMUM = 0
    SUM = 1
    WEIGHTED_SUM = 2


class RowSum(IntEnum):
    """Columns of ``RowSums.numbers``, which has a name for each."""

    DIVERGENCE = 0
    TOTAL = 1
    CLIPPED_ENTRIES = 2
    CLIPPED_TEACHER_MASS = 3
    TOP1_AGREEMENT = 4


@dataclass(frozen=True)
class RowSums:
    """Each row's sums over the vocabulary, or over a shard's part of it: one tensor, so that ranks add all at once.

    Attributes:
        numbers: [C, 5] float64, its columns in the order of ``RowSum``.
    """

    numbers: Tensor

    @classmethod
    def zeros(cls, rows: int, device: torch.device) -> RowSums:
        """All zero, for so many rows."""
        return cls(torch.zeros(rows, len(RowSum), dtype=torch.float64, device=device))

    @property
    def divergence(self) -> Tensor:
        """Sum of min(l, entry_clip), [C], in nats."""
        return self.numbers[:, RowSum.DIVERGENCE]

    @property
    def total(self) -> Tensor:
        """S, the sum of G, [C]; exactly 0 where ``DivergenceTerms.total_is_zero``."""
        return self.numbers[:, RowSum.TOTAL]

    @property
    def clipped_entries(self) -> Tensor:
        """How many entries are above entry_clip, [C]."""
        return self.numbers[:, RowSum.CLIPPED_ENTRIES]

    @property
    def clipped_teacher_mass(self) -> Tensor:
        """The teacher's probability on those entries, [C]."""
        return self.numbers[:, RowSum.CLIPPED_TEACHER_MASS]

    @property
    def top1_agreement(self) -> Tensor:
        """Parts of the vocabulary, [C], that have an entry that is likeliest for both; 0 where there is none."""
        return self.numbers[:, RowSum.TOP1_AGREEMENT]


@dataclass(frozen=True)
class DivergenceTerms:
    """The divergence of ``reference.divergence`` up to the sum over the vocabulary; the names mean the same."""

    kind: DivergenceKind
    jsd_weight: float
    temperature: float
    entry_clip: float | None

    @property
    def total_is_zero(self) -> bool:
        """Whether S (see ``RowKernels.divergence_rows_``) is 0 for every row, so that it need not be summed."""
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


class RowKernels(Protocol):
    """Functions on the logits of one chunk of rows and one shard of the vocabulary, [C, V_local]; no collectives.

    The modules ``torch_rows`` and ``chunk_rows`` are the two that there are. The order of calls:

        rows.label_logits                                  cross-entropy alone, on untouched logits
        statistics -> (gather over shards) -> rows.merge_statistics
        divergence_rows_                                   the sums; the gradient too, where its total is known
        (sum over shards) -> divergence_dlogits_           the gradient, where its total had to be summed first
        cross_entropy_dlogits_

    From ``statistics`` on, the logits belong to these functions, which may overwrite them and keep there what a later
    call needs. Logits must be finite, and padding of the vocabulary must not be among their columns. A trailing
    underscore means that logits may be overwritten, as in torch.

    Attributes:
        WORK_BUFFERS: blocks of scratch that each call gets as ``work``, [WORK_BUFFERS, block, V_local].
    """

    WORK_BUFFERS: int

    def statistics(self, logits: Tensor, temperature: float, work: Tensor) -> Tensor:
        """Shard's part of the softmax statistics, see ``Statistic``.

        Args:
            logits: [C, V_local], float32 (``torch_rows`` takes float64 too); V_local may be 0.
            temperature: divides the logits.
            work: scratch of the same dtype.

        Returns:
            [C, 3] float64, its columns in the order of ``Statistic``.
        """
        ...

    def divergence_rows_(
        self,
        student: Tensor,
        teacher: Tensor,
        student_statistics: SoftmaxStatistics,
        teacher_statistics: SoftmaxStatistics,
        terms: DivergenceTerms,
        work: Tensor,
        gradient: LogitsGradient | None = None,
    ) -> RowSums:
        """Shard's part of each row's divergence, and its gradient where one is given.

        With l_v the entry of the sum and U = {v: l_v <= entry_clip}, the gradient of the row's divergence is
        dD/da_v = G_v - q_v S, S = sum_v G_v, where G_v = 1_U(v) dl_v/dx_v + k q_v. Any k gives the same gradient
        because sum_v q_v = 1; these make G vanish, bit for bit, where the teacher equals the student:

            forward_kl (k = +1): l = p u                         G = q - p 1_U
            reverse_kl (k = -1): l = -q u                        G = -q u on U, -q elsewhere
            jsd        (k =  0): l = w p (u + r) + (1 - w) q r   G = (1 - w) q r 1_U,  r = -log(1 - w + w e^u)

        Args:
            student: [C, V_local] logits as ``statistics`` left them.
            teacher: [C, V_local] logits, likewise.
            student_statistics: of the student's whole vocabulary.
            teacher_statistics: of the teacher's whole vocabulary.
            terms: which divergence.
            work: scratch.
            gradient: what to write of the gradient in the same pass; None where its total is not known yet.

        Returns:
            The shard's sums.
        """
        ...

    def divergence_dlogits_(
        self,
        student: Tensor,
        teacher: Tensor,
        student_statistics: SoftmaxStatistics,
        teacher_statistics: SoftmaxStatistics,
        terms: DivergenceTerms,
        work: Tensor,
        gradient: LogitsGradient,
    ) -> None:
        """Write the gradient after ``divergence_rows_``, once its total is known; the arguments are the same."""
        ...

    def cross_entropy_dlogits_(
        self,
        logits: Tensor,
        merged: SoftmaxStatistics,
        labels: Tensor,
        first_id: int,
        temperature: float,
        scale: Tensor,
        out: Tensor,
        work: Tensor,
    ) -> None:
        """Write the gradient of the weighted cross-entropy with respect to the logits: scale (q - onehot(label)).

        Args:
            logits: [C, V_local] as ``statistics`` left them.
            merged: statistics of the whole vocabulary.
            labels: [C], int64 vocabulary ids.
            first_id: vocabulary id of the first column.
            temperature: that ``statistics`` was given.
            scale: [C] float64, row weight / temperature.
            out: [C, V_local], overwritten; may be the logits themselves.
            work: scratch.
        """
        ...


def merge_statistics(parts: Tensor) -> SoftmaxStatistics:
    """Join the statistics of all shards: every rank that merges the same parts gets the same bits.

    Args:
        parts: [shards, C, 3] float64 from ``RowKernels.statistics``, in shard order; some shard has at least one
            column.

    Returns:
        Statistics of the whole vocabulary.

    Raises:
        UserError: the parts are not such a tensor.
    """
    Arguments("merge_statistics").tensor("parts", parts, "shards C 3", (torch.float64,))
    maximum, total, weighted = join_parts(parts).unbind(dim=-1)
    return SoftmaxStatistics(maximum, total.log(), total.log() - weighted / total)


def join_parts(parts: Tensor) -> Tensor:
    """Join the statistics of parts of the vocabulary: [parts, C, 3] -> [C, 3], float64, columns as in ``Statistic``."""
    maxima, sums, weighted = parts.unbind(dim=-1)
    maximum = maxima.amax(dim=0)
    offset = maxima - maximum
    scale = offset.exp()
    return torch.stack((maximum, (scale * sums).sum(dim=0), (scale * (weighted + sums * offset)).sum(dim=0)), dim=-1)


def normalisers(*views: SoftmaxStatistics) -> Tensor:
    """Maximum and log_sum of each view in turn, [C, 2 views] float64, as Triton kernels read them."""
    return torch.stack([column for view in views for column in (view.maximum, view.log_sum)], dim=1)


def label_logits(logits: Tensor, labels: Tensor, first_id: int, temperature: float) -> Tensor:
    """Logit of each row's label, over the temperature, where this shard holds it, else 0: summed over shards, it.

    Args:
        logits: [C, V_local], float32 or float64, not yet seen by ``RowKernels.statistics``.
        labels: [C], int64 vocabulary ids.
        first_id: vocabulary id of the first column.
        temperature: divides the logits.

    Returns:
        [C] float64.

    Raises:
        UserError: an argument breaks its rule.
    """
    check = Arguments("label_logits")
    check.tensor("logits", logits, "C V_local", EXACT)
    check.tensor("labels", labels, "C", (torch.int64,))
    check.integer("first_id", first_id, 0)
    check.number("temperature", temperature)
    if logits.shape[1] == 0:
        return torch.zeros(labels.shape, dtype=torch.float64, device=logits.device)
    held, columns = local_columns(labels, first_id, logits.shape[1])
    return torch.where(held, logits.gather(1, columns)[:, 0] * (1 / temperature), 0).double()


def local_columns(labels: Tensor, first_id: int, width: int) -> tuple[Tensor, Tensor]:
    """Whether this shard holds each row's label [C], and its column [C, 1] (any valid one where it does not)."""
    local = labels - first_id
    return (local >= 0) & (local < width), local.clamp(0, width - 1)[:, None]
