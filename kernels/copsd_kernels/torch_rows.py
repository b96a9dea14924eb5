"""The row kernels of ``torch``: plain torch, any device, any dtype; ``rows.RowKernels`` has their contract.

A chunk's logits are read and overwritten in blocks of a few rows, so that the many elementwise passes run in cache and
their temporaries are a few rows, not a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from copsd_kernels import scratch
from copsd_kernels.arguments import EXACT
from copsd_kernels.reference import DivergenceKind
from copsd_kernels.row_arguments import check_cross_entropy, check_divergence, check_statistics
from copsd_kernels.rows import (
    MAX_JSD_LOG_RATIO,
    NO_COLUMNS,
    DivergenceTerms,
    LogitsGradient,
    RowSums,
    SoftmaxStatistics,
    Statistic,
    local_columns,
)

WORK_BUFFERS = scratch.WORK_BUFFERS["torch"]


def statistics(logits: Tensor, temperature: float, work: Tensor) -> Tensor:
    """See ``rows.RowKernels.statistics``; the logits are divided by the temperature, in place."""
    check_statistics(logits, temperature, work, EXACT)
    parts = torch.zeros(logits.shape[0], len(Statistic), dtype=torch.float64, device=logits.device)
    if logits.shape[1] == 0:
        parts[:, Statistic.MAXIMUM] = NO_COLUMNS
        return parts
    for rows, (shifted, exponentials, _) in _blocks(logits.shape[0], work):
        block = logits[rows] if temperature == 1 else logits[rows].mul_(1 / temperature)
        maximum = block.amax(dim=-1)
        torch.sub(block, maximum[:, None], out=shifted)
        torch.exp(shifted, out=exponentials)
        parts[rows, Statistic.MAXIMUM] = maximum.double()
        parts[rows, Statistic.SUM] = exponentials.sum(dim=-1).double()
        parts[rows, Statistic.WEIGHTED_SUM] = shifted.mul_(exponentials).sum(dim=-1).double()
    return parts


def divergence_rows_(
    student: Tensor,
    teacher: Tensor,
    student_statistics: SoftmaxStatistics,
    teacher_statistics: SoftmaxStatistics,
    terms: DivergenceTerms,
    work: Tensor,
    gradient: LogitsGradient | None = None,
) -> RowSums:
    """See ``rows.RowKernels.divergence_rows_``; the student's logits become q, the teacher's G."""
    check_divergence(student, teacher, student_statistics, teacher_statistics, terms, work, gradient, EXACT)
    sums = RowSums.zeros(student.shape[0], student.device)
    if student.shape[1] == 0:
        return sums
    student_maximum, student_log_sum = _as_columns(student_statistics, student.dtype)
    teacher_maximum, teacher_log_sum = _as_columns(teacher_statistics, student.dtype)
    # Subtracted before it is rounded: between near-equal models it is tiny, and so is u.
    gap = (teacher_statistics.log_sum - student_statistics.log_sum)[:, None].to(student.dtype)
    kind, entry_clip = terms.kind, terms.entry_clip
    for rows, (log_ratio, spare, clipped) in _blocks(student.shape[0], work):
        x, y = student[rows].sub_(student_maximum[rows]), teacher[rows].sub_(teacher_maximum[rows])
        # Neither is positive, so their sum is 0 where both are at their maxima and nowhere else.
        sums.top1_agreement[rows] = (torch.add(x, y, out=spare).amax(dim=-1) == 0).double()
        torch.sub(y, x, out=log_ratio).sub_(gap[rows])
        q, p = x.sub_(student_log_sum[rows]).exp_(), y.sub_(teacher_log_sum[rows]).exp_()
        entries = _entries_(q, p, log_ratio, spare, kind, terms.jsd_weight)
        if entry_clip is not None:
            count, mass = _clip_(entries, p, clipped, entry_clip)
            sums.clipped_entries[rows], sums.clipped_teacher_mass[rows] = count, mass
        sums.divergence[rows] = entries.sum(dim=-1).double()
        g = _gradient_entries_(q, p, log_ratio, spare, None if entry_clip is None else clipped, kind)
        if not terms.total_is_zero:
            sums.total[rows] = g.sum(dim=-1).double()
        if gradient is not None:
            _write_gradient(q, g, gradient, rows)
    return sums


def divergence_dlogits_(
    student: Tensor,
    teacher: Tensor,
    student_statistics: SoftmaxStatistics,
    teacher_statistics: SoftmaxStatistics,
    terms: DivergenceTerms,
    work: Tensor,
    gradient: LogitsGradient,
) -> None:
    """See ``rows.RowKernels.divergence_dlogits_``; the logits are q and G, as ``divergence_rows_`` left them."""
    check_divergence(student, teacher, student_statistics, teacher_statistics, terms, work, gradient, EXACT)
    for rows, _ in _blocks(student.shape[0], work):
        _write_gradient(student[rows], teacher[rows], gradient, rows)


def cross_entropy_dlogits_(
    logits: Tensor,
    merged: SoftmaxStatistics,
    labels: Tensor,
    first_id: int,
    temperature: float,
    scale: Tensor,
    out: Tensor,
    work: Tensor,
) -> None:
    """See ``rows.RowKernels.cross_entropy_dlogits_``; ``statistics`` has divided by the temperature already."""
    check_cross_entropy(logits, merged, labels, first_id, temperature, scale, out, work, EXACT)
    if logits.shape[1] == 0:
        return
    maximum, log_sum = _as_columns(merged, logits.dtype)
    factor = scale[:, None].to(logits.dtype)
    held, columns = local_columns(labels, first_id, logits.shape[1])
    for rows, _ in _blocks(logits.shape[0], work):
        block = logits[rows].sub_(maximum[rows]).sub_(log_sum[rows]).exp_().mul_(factor[rows])
        block.scatter_add_(1, columns[rows], torch.where(held[rows, None], -factor[rows], 0))
        if out is not logits:
            out[rows] = block


def _blocks(rows: int, work: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cut rows into blocks as large as the scratch, each with the scratch that it may overwrite."""
    size = work.shape[1]
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        yield slice(start, stop), work[:, : stop - start]


def _write_gradient(q: Tensor, g: Tensor, gradient: LogitsGradient, rows: slice) -> None:
    """Write scale (G - q S); q is overwritten where S is not 0."""
    if gradient.total is not None:
        g = q.mul_(-gradient.total[rows, None].to(q.dtype)).add_(g)
    torch.mul(g, gradient.scale[rows, None].to(q.dtype), out=gradient.out[rows])


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
    u.clamp_(max=MAX_JSD_LOG_RATIO)
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
