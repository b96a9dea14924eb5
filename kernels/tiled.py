"""Row functions of the fused losses in plain torch: one vocabulary shard, one chunk of rows, no collectives.

A chunk's logits [C, V_local] live in scratch that the caller owns. The functions below read and overwrite it in blocks
of a few rows, so that the many elementwise passes run in cache and their temporaries are a few rows, not a chunk:

    statistics -> (caller gathers over shards) -> merge_statistics
    divergence_rows_ -> (caller sums over shards) -> divergence_dlogits_
    label_logits, cross_entropy_dlogits_

Anything that keeps these signatures, such as a Triton kernel, can take their place. A trailing underscore means that
the logits arguments are overwritten, as in torch. Logits must be finite, and padding of the vocabulary must not be
among their columns.

Notation: q student, p teacher, x = log q, y = log p, u = y - x.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from copsd_kernels.reference import DivergenceKind

WORK_BUFFERS = 3

# The maximum that a shard without columns reports: finite, so that differences of two maxima are never NaN.
_NO_COLUMNS = -1e30

# From here on w e^u dominates 1 - w beyond float64, so log(1 - w + w e^u) = u + log w, and e^u still fits in float32.
_MAX_JSD_LOG_RATIO = 60.0


@dataclass(frozen=True)
class SoftmaxStatistics:
    """What a softmax over the whole vocabulary needs to know of each row; all [C], float64.

    Attributes:
        maximum: largest logit m.
        log_sum: log sum_v exp(logit_v - m). Kept apart from m: logits shift by m without rounding where it matters,
            and what is left to subtract is small.
        entropy: in nats.
    """

    maximum: Tensor
    log_sum: Tensor
    entropy: Tensor

    @property
    def log_normaliser(self) -> Tensor:
        """log sum_v exp(logit_v), [C] float64."""
        return self.maximum + self.log_sum


def statistics(logits: Tensor, work: Tensor) -> Tensor:
    """Shard's part of the softmax statistics: m = max z, d = sum exp(z - m), c = sum exp(z - m) (z - m).

    Args:
        logits: [C, V_local], float32 or float64; V_local may be 0.
        work: [WORK_BUFFERS, block, V_local] scratch of the same dtype.

    Returns:
        [C, 3] float64, the columns m, d, c.
    """
    parts = torch.zeros(logits.shape[0], 3, dtype=torch.float64, device=logits.device)
    if logits.shape[1] == 0:
        parts[:, 0] = _NO_COLUMNS
        return parts
    for rows, (shifted, exponentials, _) in _blocks(logits.shape[0], work):
        block = logits[rows]
        maximum = block.amax(dim=-1)
        torch.sub(block, maximum[:, None], out=shifted)
        torch.exp(shifted, out=exponentials)
        parts[rows, 0] = maximum.double()
        parts[rows, 1] = exponentials.sum(dim=-1).double()
        parts[rows, 2] = shifted.mul_(exponentials).sum(dim=-1).double()
    return parts


def merge_statistics(parts: Tensor) -> SoftmaxStatistics:
    """Join the statistics of all shards: every rank that merges the same parts gets the same bits.

    Args:
        parts: [shards, C, 3] float64 from ``statistics``, in shard order; some shard has at least one column.

    Returns:
        Statistics of the whole vocabulary.
    """
    maxima, sums, weighted = parts.unbind(dim=-1)
    maximum = maxima.amax(dim=0)
    offset = maxima - maximum
    scale = offset.exp()
    total = (scale * sums).sum(dim=0)
    expected = (scale * (weighted + sums * offset)).sum(dim=0) / total
    return SoftmaxStatistics(maximum, total.log(), total.log() - expected)


def divergence_rows_(
    student: Tensor,
    teacher: Tensor,
    student_statistics: SoftmaxStatistics,
    teacher_statistics: SoftmaxStatistics,
    kind: DivergenceKind,
    jsd_weight: float,
    entry_clip: float | None,
    work: Tensor,
) -> Tensor:
    """Shard's part of each row's divergence; leaves q in ``student`` and the gradient entries G in ``teacher``.

    With l_v the entry of the sum and U = {v: l_v <= entry_clip}, the gradient of the row's divergence is
    dD/dz_v = G_v - q_v S, S = sum_v G_v, where G_v = 1_U(v) dl_v/dx_v + k q_v. Any k gives the same gradient because
    sum_v q_v = 1; these make G vanish, bit for bit, where the teacher equals the student:

        forward_kl (k = +1): l = p u                         G = q - p 1_U
        reverse_kl (k = -1): l = -q u                        G = -q u on U, -q elsewhere
        jsd        (k =  0): l = w p (u + r) + (1 - w) q r   G = (1 - w) q r 1_U,  r = -log(1 - w + w e^u)

    Args:
        student: [C, V_local] logits, float32 or float64; becomes q.
        teacher: [C, V_local] logits, same dtype; becomes G.
        student_statistics: of the student's whole vocabulary.
        teacher_statistics: of the teacher's whole vocabulary.
        kind: which divergence.
        jsd_weight: w, the teacher's weight in the mixture.
        entry_clip: cap of each entry in nats, or None.
        work: [WORK_BUFFERS, block, V_local] scratch.

    Returns:
        [C, 5] float64: the shard's sums of min(l, entry_clip), of G (exactly 0 for forward_kl without a clip), of
        clipped entries and of the teacher's mass on them; then 1 where an entry is likeliest for both.
    """
    sums = torch.zeros(student.shape[0], 5, dtype=torch.float64, device=student.device)
    if student.shape[1] == 0:
        return sums
    student_maximum, student_log_sum = _as_columns(student_statistics, student.dtype)
    teacher_maximum, teacher_log_sum = _as_columns(teacher_statistics, student.dtype)
    # Subtracted before it is rounded: between near-equal models it is tiny, and so is u.
    gap = (teacher_statistics.log_sum - student_statistics.log_sum)[:, None].to(student.dtype)
    for rows, (log_ratio, spare, clipped) in _blocks(student.shape[0], work):
        x, y = student[rows].sub_(student_maximum[rows]), teacher[rows].sub_(teacher_maximum[rows])
        # Neither is positive, so their sum is 0 where both are at their maxima and nowhere else.
        sums[rows, 4] = (torch.add(x, y, out=spare).amax(dim=-1) == 0).double()
        torch.sub(y, x, out=log_ratio).sub_(gap[rows])
        q, p = x.sub_(student_log_sum[rows]).exp_(), y.sub_(teacher_log_sum[rows]).exp_()
        entries = _entries_(q, p, log_ratio, spare, kind, jsd_weight)
        if entry_clip is not None:
            sums[rows, 2], sums[rows, 3] = _clip_(entries, p, clipped, entry_clip)
        sums[rows, 0] = entries.sum(dim=-1).double()
        gradient = _gradient_entries_(q, p, log_ratio, spare, None if entry_clip is None else clipped, kind)
        if kind != "forward_kl" or entry_clip is not None:
            sums[rows, 1] = gradient.sum(dim=-1).double()
    return sums


def divergence_dlogits_(student: Tensor, teacher: Tensor, total: Tensor, scale: Tensor, work: Tensor) -> Tensor:
    """Gradient of the weighted divergence with respect to the logits, in place: scale (G - q S).

    Args:
        student: [C, V_local], q as ``divergence_rows_`` left it; becomes the gradient.
        teacher: [C, V_local], G as ``divergence_rows_`` left it.
        total: [C] float64, S over the whole vocabulary.
        scale: [C] float64, row weight / temperature, 0 for rows whose divergence is clipped.
        work: [WORK_BUFFERS, block, V_local] scratch; only its block size is used.

    Returns:
        ``student``.
    """
    factor, shift = scale[:, None].to(student.dtype), -total[:, None].to(student.dtype)
    for rows, _ in _blocks(student.shape[0], work):
        student[rows].mul_(shift[rows]).add_(teacher[rows]).mul_(factor[rows])
    return student


def label_logits(logits: Tensor, labels: Tensor, start: int) -> Tensor:
    """Logit of each row's label where this shard holds it, else 0, so that the sum over shards is the logit.

    Args:
        logits: [C, V_local], float32 or float64.
        labels: [C], int64 vocabulary ids.
        start: vocabulary id of the first column.

    Returns:
        [C] float64.
    """
    if logits.shape[1] == 0:
        return torch.zeros(labels.shape, dtype=torch.float64, device=logits.device)
    held, columns = _local_columns(labels, start, logits.shape[1])
    return torch.where(held, logits.gather(1, columns)[:, 0], 0).double()


def cross_entropy_dlogits_(
    logits: Tensor, merged: SoftmaxStatistics, labels: Tensor, start: int, scale: Tensor, work: Tensor
) -> Tensor:
    """Gradient of the weighted cross-entropy with respect to the logits, in place: scale (q - onehot(label)).

    Args:
        logits: [C, V_local], float32 or float64; becomes the gradient.
        merged: statistics of the whole vocabulary.
        labels: [C], int64 vocabulary ids.
        start: vocabulary id of the first column.
        scale: [C] float64, row weight / temperature.
        work: [WORK_BUFFERS, block, V_local] scratch; only its block size is used.

    Returns:
        ``logits``.
    """
    if logits.shape[1] == 0:
        return logits
    maximum, log_sum = _as_columns(merged, logits.dtype)
    factor = scale[:, None].to(logits.dtype)
    held, columns = _local_columns(labels, start, logits.shape[1])
    for rows, _ in _blocks(logits.shape[0], work):
        logits[rows].sub_(maximum[rows]).sub_(log_sum[rows]).exp_().mul_(factor[rows])
    return logits.scatter_add_(1, columns, torch.where(held[:, None], -factor, 0))


def _blocks(rows: int, work: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cut rows into blocks as large as the scratch, each with the scratch that it may overwrite."""
    size = work.shape[1]
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        yield slice(start, stop), work[:, : stop - start]


def _as_columns(merged: SoftmaxStatistics, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Maximum and log_sum as [C, 1] in the dtype of the logits; the maximum is one of them, so it stays exact."""
    return merged.maximum[:, None].to(dtype), merged.log_sum[:, None].to(dtype)


def _entries_(q: Tensor, p: Tensor, u: Tensor, spare: Tensor, kind: DivergenceKind, w: float) -> Tensor:
    """Entries l_v of the sum. forward_kl, reverse_kl: in ``spare``; jsd: in ``u``, with (1 - w) q r in ``spare``."""
    if kind == "forward_kl":
        return torch.mul(p, u, out=spare)
    if kind == "reverse_kl":
        return torch.mul(q, u, out=spare).neg_()
    # Through u alone, m is never formed: it may underflow where r does not, and r keeps its relative precision at 0.
    u.clamp_(max=_MAX_JSD_LOG_RATIO)
    r = torch.expm1(u, out=spare).mul_(w).log1p_().neg_()
    u.add_(r).mul_(p).mul_(w)
    r.mul_(q).mul_(1 - w)
    return u.add_(r)


def _clip_(entries: Tensor, p: Tensor, clipped: Tensor, entry_clip: float) -> tuple[Tensor, Tensor]:
    """Cap the entries, mark those above the cap with 1 in ``clipped``, zero p there; their count and teacher mass."""
    torch.gt(entries, entry_clip, out=clipped)
    entries.clamp_(max=entry_clip)
    mass = p.sum(dim=-1)
    _zero_(p, clipped)
    return clipped.sum(dim=-1).double(), (mass - p.sum(dim=-1)).double()


def _gradient_entries_(
    q: Tensor, p: Tensor, u: Tensor, spare: Tensor, clipped: Tensor | None, kind: DivergenceKind
) -> Tensor:
    """Gradient entries G_v, written over p, which ``_clip_`` has zeroed at the clipped entries."""
    if kind == "forward_kl":
        return torch.sub(q, p, out=p)
    if kind == "reverse_kl":
        if clipped is not None:
            _zero_(u, clipped).add_(clipped)
        return torch.mul(q, u, out=p).neg_()
    if clipped is not None:
        _zero_(spare, clipped)
    return p.copy_(spare)


def _zero_(values: Tensor, marked: Tensor) -> Tensor:
    """Zero the values marked 1 and keep those marked 0; several times faster on CPU than masked_fill_."""
    return values.addcmul_(values, marked, value=-1)


def _local_columns(labels: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Whether this shard holds each row's label [C], and its column [C, 1] (any valid one where it does not)."""
    local = labels - start
    return (local >= 0) & (local < width), local.clamp(0, width - 1)[:, None]
