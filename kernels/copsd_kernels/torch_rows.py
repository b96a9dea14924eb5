"""Row functions of the fused losses in plain torch; ``rows`` has their contract.

A chunk's logits are read and overwritten in blocks of a few rows, so that the many elementwise passes run in cache and
their temporaries are a few rows, not a chunk. A trailing underscore means that the logits are overwritten, as in torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from copsd_kernels.reference import DivergenceKind
from copsd_kernels.rows import (
    MAX_JSD_LOG_RATIO,
    NO_COLUMNS,
    DivergenceTerms,
    LogitsGradient,
    SoftmaxStatistics,
    local_columns,
)

WORK_BUFFERS = 3


def statistics(logits: Tensor, temperature: float, work: Tensor) -> Tensor:
    """Shard's part of the softmax statistics: m = max a, d = sum exp(a - m), c = sum exp(a - m) (a - m).

    Args:
        logits: [C, V_local], float32 or float64; V_local may be 0. Divided by the temperature, in place.
        temperature: divides the logits.
        work: [WORK_BUFFERS, block, V_local] scratch of the same dtype.

    Returns:
        [C, 3] float64, the columns m, d, c.
    """
    parts = torch.zeros(logits.shape[0], 3, dtype=torch.float64, device=logits.device)
    if logits.shape[1] == 0:
        parts[:, 0] = NO_COLUMNS
        return parts
    for rows, (shifted, exponentials, _) in _blocks(logits.shape[0], work):
        block = logits[rows] if temperature == 1 else logits[rows].mul_(1 / temperature)
        maximum = block.amax(dim=-1)
        torch.sub(block, maximum[:, None], out=shifted)
        torch.exp(shifted, out=exponentials)
        parts[rows, 0] = maximum.double()
        parts[rows, 1] = exponentials.sum(dim=-1).double()
        parts[rows, 2] = shifted.mul_(exponentials).sum(dim=-1).double()
    return parts


def divergence_rows_(
    student: Tensor,
    teacher: Tensor,
    student_statistics: SoftmaxStatistics,
    teacher_statistics: SoftmaxStatistics,
    terms: DivergenceTerms,
    work: Tensor,
    gradient: LogitsGradient | None = None,
) -> Tensor:
    """Shard's part of each row's divergence, and its gradient where one is given.

    With l_v the entry of the sum and U = {v: l_v <= entry_clip}, the gradient of the row's divergence is
    dD/da_v = G_v - q_v S, S = sum_v G_v, where G_v = 1_U(v) dl_v/dx_v + k q_v. Any k gives the same gradient because
    sum_v q_v = 1; these make G vanish, bit for bit, where the teacher equals the student:

        forward_kl (k = +1): l = p u                         G = q - p 1_U
        reverse_kl (k = -1): l = -q u                        G = -q u on U, -q elsewhere
        jsd        (k =  0): l = w p (u + r) + (1 - w) q r   G = (1 - w) q r 1_U,  r = -log(1 - w + w e^u)

    Args:
        student: [C, V_local] logits as ``statistics`` left them; become q.
        teacher: [C, V_local] logits, likewise; become G.
        student_statistics: of the student's whole vocabulary.
        teacher_statistics: of the teacher's whole vocabulary.
        terms: which divergence.
        work: [WORK_BUFFERS, block, V_local] scratch.
        gradient: what to write of the gradient in the same pass; None where its total is not known yet.

    Returns:
        [C, 5] float64: the shard's sums of min(l, entry_clip), of G (exactly 0 where ``terms.total_is_zero``), of
        clipped entries and of the teacher's mass on them; then 1 where an entry is likeliest for both.
    """
    sums = torch.zeros(student.shape[0], 5, dtype=torch.float64, device=student.device)
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
        sums[rows, 4] = (torch.add(x, y, out=spare).amax(dim=-1) == 0).double()
        torch.sub(y, x, out=log_ratio).sub_(gap[rows])
        q, p = x.sub_(student_log_sum[rows]).exp_(), y.sub_(teacher_log_sum[rows]).exp_()
        entries = _entries_(q, p, log_ratio, spare, kind, terms.jsd_weight)
        if entry_clip is not None:
            sums[rows, 2], sums[rows, 3] = _clip_(entries, p, clipped, entry_clip)
        sums[rows, 0] = entries.sum(dim=-1).double()
        g = _gradient_entries_(q, p, log_ratio, spare, None if entry_clip is None else clipped, kind)
        if not terms.total_is_zero:
            sums[rows, 1] = g.sum(dim=-1).double()
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
    """Write the gradient after ``divergence_rows_``, once its total is known; the arguments are the same."""
    for rows, _ in _blocks(student.shape[0], work):
        _write_gradient(student[rows], teacher[rows], gradient, rows)


def cross_entropy_dlogits_(
    logits: Tensor,
    merged: SoftmaxStatistics,
    labels: Tensor,
    start: int,
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
        start: vocabulary id of the first column.
        temperature: unused here: ``statistics`` has divided by it.
        scale: [C] float64, row weight / temperature.
        out: [C, V_local], overwritten; may be the logits themselves.
        work: [WORK_BUFFERS, block, V_local] scratch; only its block size is used.
    """
    if logits.shape[1] == 0:
        return
    maximum, log_sum = _as_columns(merged, logits.dtype)
    factor = scale[:, None].to(logits.dtype)
    held, columns = local_columns(labels, start, logits.shape[1])
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
