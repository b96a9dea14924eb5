"""The row kernels of ``chunk``, in Triton; ``rows.RowKernels`` has their contract and their equations.

One program walks over one row. The logits are read and never overwritten, except where the caller wants the gradient
written over them; a program reads each block of its row before it writes there. Sums run in float64, once a block.

Logits are float32. Under TRITON_INTERPRET=1 (set before this module is imported) everything runs on CPU tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from copsd_kernels import scratch
from copsd_kernels.row_arguments import check_cross_entropy, check_divergence, check_statistics
from copsd_kernels.rows import (
    NO_COLUMNS,
    DivergenceTerms,
    LogitsGradient,
    RowSum,
    RowSums,
    SoftmaxStatistics,
    Statistic,
    normalisers,
)
from copsd_kernels.triton_entries import (
    KIND_CODES,
    STATISTICS,
    SUMS_OF_ROW,
    divergence_entries,
    gradient_entries,
    store_statistics,
    store_sums,
)

WORK_BUFFERS = scratch.WORK_BUFFERS["chunk"]

# Columns that a program holds at once, and its warps. Other pairs (1024 to 4096 columns, 4 to 16 warps) make the
# compiler spill registers for some divergence or GPU generation; ``copsd bench compile`` shows it.
BLOCK = 2048
WARPS = 4

_DTYPES = (torch.float32,)  # of logits

_NO_COLUMNS = tl.constexpr(NO_COLUMNS)


@triton.jit
def statistics_kernel(logits, parts, row_stride, columns, inverse_temperature, BLOCK: tl.constexpr):
    """Running maximum m, d = sum exp(a - m) and c = sum exp(a - m) (a - m) of one row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    m = tl.full((), _NO_COLUMNS, tl.float32)
    d = tl.full((), 0.0, tl.float64)
    c = tl.full((), 0.0, tl.float64)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < columns
        a = tl.load(logits + offsets, mask=inside, other=0.0) * inverse_temperature
        new_m = tl.maximum(m, tl.max(tl.where(inside, a, _NO_COLUMNS), axis=0))
        # Masked after the exponential: where a whole block is masked, exp(m - m) would count.
        shifted = tl.where(inside, a - new_m, 0.0)
        e = tl.where(inside, tl.exp(shifted), 0.0)
        offset = (m - new_m).to(tl.float64)
        rescale = tl.exp(offset)
        c = rescale * (c + d * offset) + tl.sum(e * shifted, axis=0).to(tl.float64)
        d = rescale * d + tl.sum(e, axis=0).to(tl.float64)
        m = new_m
    store_statistics(parts + row * STATISTICS, m, d, c, True)


@triton.jit
def divergence_kernel(
    student,
    teacher,
    statistics,
    sums,
    out,
    scale,
    total,
    student_stride,
    teacher_stride,
    out_stride,
    columns,
    inverse_temperature,
    jsd_weight,
    entry_clip,
    KIND: tl.constexpr,
    CLIP: tl.constexpr,
    TOTAL: tl.constexpr,
    SUMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of one row (SUMS), its gradient scale (G - q S) (GRADIENT; S is 0 without TOTAL), or both."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    out += row * out_stride
    # In the order of ``rows.normalisers``.
    student_maximum = tl.load(statistics + row * 4).to(tl.float32)
    student_log_sum = tl.load(statistics + row * 4 + 1)
    teacher_maximum = tl.load(statistics + row * 4 + 2).to(tl.float32)
    teacher_log_sum = tl.load(statistics + row * 4 + 3)
    # Subtracted before it is rounded: between near-equal models it is tiny, and so is u.
    gap = (teacher_log_sum - student_log_sum).to(tl.float32)
    student_log_sum = student_log_sum.to(tl.float32)
    teacher_log_sum = teacher_log_sum.to(tl.float32)
    if GRADIENT:
        factor = tl.load(scale + row).to(tl.float32)
        if TOTAL:
            s = tl.load(total + row).to(tl.float32)
    if SUMS:
        divergence = tl.full((), 0.0, tl.float64)
        g_sum = tl.full((), 0.0, tl.float64)
        clipped_entries = tl.full((), 0.0, tl.float64)
        clipped_mass = tl.full((), 0.0, tl.float64)
        highest = tl.full((), _NO_COLUMNS, tl.float32)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < columns
        x = tl.load(student + offsets, mask=inside, other=0.0) * inverse_temperature - student_maximum
        y = tl.load(teacher + offsets, mask=inside, other=0.0) * inverse_temperature - teacher_maximum
        u = (y - x) - gap
        q = tl.exp(x - student_log_sum)
        p = tl.exp(y - teacher_log_sum)
        entries, direct = divergence_entries(q, p, u, jsd_weight, KIND)
        clipped = inside & (entries > entry_clip) if CLIP else inside & False
        g = gradient_entries(q, direct, clipped, KIND)
        if SUMS:
            capped = entries
            if CLIP:
                capped = tl.minimum(entries, entry_clip)
                clipped_entries += tl.sum(clipped.to(tl.float32), axis=0).to(tl.float64)
                clipped_mass += tl.sum(tl.where(clipped, p, 0.0), axis=0).to(tl.float64)
            # Padded columns are masked last, whatever the arithmetic made of them.
            divergence += tl.sum(tl.where(inside, capped, 0.0), axis=0).to(tl.float64)
            if TOTAL:
                g_sum += tl.sum(tl.where(inside, g, 0.0), axis=0).to(tl.float64)
            # Neither is positive, so their sum is 0 where both are at their maxima and nowhere else.
            highest = tl.maximum(highest, tl.max(tl.where(inside, x + y, _NO_COLUMNS), axis=0))
        if GRADIENT:
            if TOTAL:
                g -= q * s
            tl.store(out + offsets, (factor * g).to(out.dtype.element_ty), mask=inside)
    if SUMS:
        store_sums(sums + row * SUMS_OF_ROW, divergence, g_sum, clipped_entries, clipped_mass, highest, True)


@triton.jit
def cross_entropy_kernel(
    logits,
    statistics,
    labels,
    scale,
    out,
    row_stride,
    out_stride,
    columns,
    first_id,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    """Gradient of one row's weighted cross-entropy: scale (q - onehot(label))."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    out += row * out_stride
    maximum = tl.load(statistics + row * 2).to(tl.float32)
    log_sum = tl.load(statistics + row * 2 + 1).to(tl.float32)
    label = tl.load(labels + row) - first_id
    factor = tl.load(scale + row).to(tl.float32)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < columns
        a = tl.load(logits + offsets, mask=inside, other=0.0) * inverse_temperature
        q = tl.exp(a - maximum - log_sum) - tl.where(offsets == label, 1.0, 0.0)
        tl.store(out + offsets, (factor * q).to(out.dtype.element_ty), mask=inside)


def statistics(logits: Tensor, temperature: float, work: Tensor) -> Tensor:
    """See ``rows.RowKernels.statistics``; the logits are left alone."""
    check_statistics(logits, temperature, work, _DTYPES)
    parts = torch.empty(logits.shape[0], len(Statistic), dtype=torch.float64, device=logits.device)
    _launch(statistics_kernel, logits, parts, logits.stride(0), logits.shape[1], 1 / temperature)
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
    """See ``rows.RowKernels.divergence_rows_``; logits are left alone, unless the gradient goes over them."""
    check_divergence(student, teacher, student_statistics, teacher_statistics, terms, work, gradient, _DTYPES)
    sums = torch.empty(student.shape[0], len(RowSum), dtype=torch.float64, device=student.device)
    _divergence(student, teacher, student_statistics, teacher_statistics, terms, sums, gradient)
    return RowSums(sums)


def divergence_dlogits_(
    student: Tensor,
    teacher: Tensor,
    student_statistics: SoftmaxStatistics,
    teacher_statistics: SoftmaxStatistics,
    terms: DivergenceTerms,
    work: Tensor,
    gradient: LogitsGradient,
) -> None:
    """See ``rows.RowKernels.divergence_dlogits_``."""
    check_divergence(student, teacher, student_statistics, teacher_statistics, terms, work, gradient, _DTYPES)
    _divergence(student, teacher, student_statistics, teacher_statistics, terms, None, gradient)


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
    """See ``rows.RowKernels.cross_entropy_dlogits_``; here the logits are not divided by the temperature yet."""
    check_cross_entropy(logits, merged, labels, first_id, temperature, scale, out, work, _DTYPES)
    _launch(
        cross_entropy_kernel,
        logits,
        normalisers(merged),
        labels,
        scale,
        out,
        logits.stride(0),
        out.stride(0),
        logits.shape[1],
        first_id,
        1 / temperature,
    )


def _divergence(
    student: Tensor,
    teacher: Tensor,
    student_statistics: SoftmaxStatistics,
    teacher_statistics: SoftmaxStatistics,
    terms: DivergenceTerms,
    sums: Tensor | None,
    gradient: LogitsGradient | None,
) -> None:
    merged = normalisers(student_statistics, teacher_statistics)
    out = student if gradient is None else gradient.out
    # An argument that its flags switch off still needs a pointer.
    _launch(
        divergence_kernel,
        student,
        teacher,
        merged,
        merged if sums is None else sums,
        out,
        merged if gradient is None else gradient.scale,
        merged if gradient is None or gradient.total is None else gradient.total,
        student.stride(0),
        teacher.stride(0),
        out.stride(0),
        student.shape[1],
        1 / terms.temperature,
        terms.jsd_weight,
        0.0 if terms.entry_clip is None else terms.entry_clip,
        flags={
            "KIND": KIND_CODES[terms.kind],
            "CLIP": terms.entry_clip is not None,
            "TOTAL": not terms.total_is_zero,
            "SUMS": sums is not None,
            "GRADIENT": gradient is not None,
        },
    )


def _launch(
    kernel: triton.JITFunction, logits: Tensor, *arguments: object, flags: dict[str, object] | None = None
) -> None:
    """One program for each row; a shard without columns still stores what its sums are."""
    if logits.shape[0] > 0:
        kernel[(logits.shape[0],)](logits, *arguments, **(flags or {}), BLOCK=BLOCK, num_warps=WARPS)
