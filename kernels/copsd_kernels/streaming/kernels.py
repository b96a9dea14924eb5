"""The kernels of ``streaming``, in Triton: products with the output weight and what a loss makes of the logits in one.

A program multiplies a block of rows with one tile of the weight after another and reduces each tile of logits while it
is in registers; the student's and the teacher's tile share the weight's. Accumulators are float32. Every program sums
in a fixed order and nothing is added atomically: the same inputs give the same bits. Logits are computed again in every
pass.
"""

from __future__ import annotations

import triton
import triton.language as tl

from copsd_kernels.rows import NO_COLUMNS
from copsd_kernels.triton_entries import (
    STATISTICS,
    SUMS_OF_ROW,
    divergence_entries,
    gradient_entries,
    store_statistics,
    store_sums,
)

_NO_COLUMNS = tl.constexpr(NO_COLUMNS)


@triton.jit
def _load(
    matrix,
    first,
    count,
    start,
    depth,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """[BLOCK_ROWS, BLOCK_DEPTH] of a matrix [count, depth]; rows that it lacks are any finite ones."""
    if DESCRIPTORS:
        tile = matrix.load([first, start])
    else:
        rows = tl.minimum(first + tl.arange(0, BLOCK_ROWS), count - 1).to(tl.int64)
        columns = start + tl.arange(0, BLOCK_DEPTH)
        pointers = matrix + rows[:, None] * depth + columns[None, :]
        tile = tl.load(pointers) if EVEN else tl.load(pointers, mask=columns[None, :] < depth, other=0.0)
    return tile


@triton.jit
def _logits_tiles(
    student,
    teacher,
    weight,
    teacher_weight,
    first_row,
    rows,
    first_column,
    columns,
    depth,
    inverse_temperature,
    VIEWS: tl.constexpr,
    SHARED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Both views' logits over the temperature, [BLOCK_ROWS, BLOCK_COLUMNS]; the first twice where there is one view."""
    a = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    b = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, depth, BLOCK_DEPTH):
        w = _load(weight, first_column, columns, start, depth, DESCRIPTORS, EVEN, BLOCK_COLUMNS, BLOCK_DEPTH)
        x = _load(student, first_row, rows, start, depth, DESCRIPTORS, EVEN, BLOCK_ROWS, BLOCK_DEPTH)
        a = tl.dot(x, w.to(x.dtype).T, a, input_precision="ieee")
        if VIEWS == 2:
            if not SHARED:
                w = _load(
                    teacher_weight, first_column, columns, start, depth, DESCRIPTORS, EVEN, BLOCK_COLUMNS, BLOCK_DEPTH
                )
            y = _load(teacher, first_row, rows, start, depth, DESCRIPTORS, EVEN, BLOCK_ROWS, BLOCK_DEPTH)
            b = tl.dot(y, w.to(y.dtype).T, b, input_precision="ieee")
    a *= inverse_temperature
    if VIEWS == 2:
        return a, b * inverse_temperature
    else:
        return a, a


@triton.jit
def _update(a, inside, m, d, c):
    """Running maximum m, d = sum exp(a - m), c = sum exp(a - m) (a - m) of each row, one tile further."""
    new_m = tl.maximum(m, tl.max(tl.where(inside, a, _NO_COLUMNS), axis=1))
    # Masked after the exponential: where a whole tile is masked, exp(m - m) would count.
    shifted = tl.where(inside, a - new_m[:, None], 0.0)
    e = tl.where(inside, tl.exp(shifted), 0.0)
    offset = (m - new_m).to(tl.float64)
    rescale = tl.exp(offset)
    c = rescale * (c + d * offset) + tl.sum(e * shifted, axis=1).to(tl.float64)
    d = rescale * d + tl.sum(e, axis=1).to(tl.float64)
    return new_m, d, c


@triton.jit
def statistics_kernel(
    student,
    teacher,
    weight,
    teacher_weight,
    labels,
    parts,
    rows,
    columns,
    depth,
    first_id,
    tiles_of_split,
    inverse_temperature,
    VIEWS: tl.constexpr,
    SHARED: tl.constexpr,
    LABELS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """m, d, c of each row and view over the columns of one split; the label's logit too, where the split holds it."""
    first_row = tl.program_id(0) * BLOCK_ROWS
    split = tl.program_id(1)
    row_ids = first_row + tl.arange(0, BLOCK_ROWS)
    real = row_ids < rows
    m = tl.full((BLOCK_ROWS,), _NO_COLUMNS, tl.float32)
    d = tl.zeros((BLOCK_ROWS,), tl.float64)
    c = tl.zeros((BLOCK_ROWS,), tl.float64)
    teacher_m, teacher_d, teacher_c = m, d, c
    at_label = tl.zeros((BLOCK_ROWS,), tl.float32)
    if LABELS:
        label = tl.load(labels + row_ids, mask=real, other=-1) - first_id
    first_column = split * tiles_of_split * BLOCK_COLUMNS
    last_column = tl.minimum(columns, first_column + tiles_of_split * BLOCK_COLUMNS)
    for start in range(first_column, last_column, BLOCK_COLUMNS):
        a, b = _logits_tiles(
            student, teacher, weight, teacher_weight, first_row, rows, start, columns, depth, inverse_temperature,
            VIEWS, SHARED, DESCRIPTORS, EVEN, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
        )  # fmt: skip
        ids = start + tl.arange(0, BLOCK_COLUMNS)
        inside = (ids < columns)[None, :]
        m, d, c = _update(a, inside, m, d, c)
        if VIEWS == 2:
            teacher_m, teacher_d, teacher_c = _update(b, inside, teacher_m, teacher_d, teacher_c)
        if LABELS:
            at_label += tl.sum(tl.where(inside & (ids[None, :] == label[:, None]), a, 0.0), axis=1)
    width: tl.constexpr = STATISTICS * VIEWS + LABELS
    out = parts + (split.to(tl.int64) * rows + row_ids) * width
    store_statistics(out, m, d, c, real)
    if VIEWS == 2:
        store_statistics(out + STATISTICS, teacher_m, teacher_d, teacher_c, real)
    if LABELS:
        tl.store(out + STATISTICS * VIEWS, at_label.to(tl.float64), mask=real)


@triton.jit
def _load_normalisers(statistics, row_ids, real):
    """``rows.normalisers`` of student and teacher, then the gap of their log-sums, each [BLOCK_ROWS, 1] float32."""
    statistics += row_ids * 4
    maximum = tl.load(statistics, mask=real, other=0.0).to(tl.float32)
    log_sum = tl.load(statistics + 1, mask=real, other=0.0)
    teacher_maximum = tl.load(statistics + 2, mask=real, other=0.0).to(tl.float32)
    teacher_log_sum = tl.load(statistics + 3, mask=real, other=0.0)
    # Subtracted before it is rounded: between near-equal models it is tiny, and so is u.
    gap = (teacher_log_sum - log_sum).to(tl.float32)
    log_sum, teacher_log_sum = log_sum.to(tl.float32), teacher_log_sum.to(tl.float32)
    return maximum[:, None], log_sum[:, None], teacher_maximum[:, None], teacher_log_sum[:, None], gap[:, None]


@triton.jit
def _softmaxes(a, b, normalisers):
    """x + y (neither is positive: 0 where both are at their maxima and nowhere else), u, q and p of a tile."""
    maximum, log_sum, teacher_maximum, teacher_log_sum, gap = normalisers
    x = a - maximum
    y = b - teacher_maximum
    return x + y, (y - x) - gap, tl.exp(x - log_sum), tl.exp(y - teacher_log_sum)


@triton.jit
def _row_sum(values, inside):
    """Sum over the columns that are there, float64; masked last, whatever the arithmetic made of the others."""
    return tl.sum(tl.where(inside, values, 0.0), axis=1).to(tl.float64)


@triton.jit
def divergence_kernel(
    student,
    teacher,
    weight,
    teacher_weight,
    statistics,
    sums,
    out,
    scale,
    total,
    rows,
    first,
    columns,
    depth,
    out_stride,
    tiles_of_split,
    inverse_temperature,
    jsd_weight,
    entry_clip,
    KIND: tl.constexpr,
    CLIP: tl.constexpr,
    TOTAL: tl.constexpr,
    SUMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    SHARED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Over columns [first, columns): sums of each row (SUMS), gradient scale (G - q S) (GRADIENT), or both."""
    first_row = tl.program_id(0) * BLOCK_ROWS
    split = tl.program_id(1)
    row_ids = first_row + tl.arange(0, BLOCK_ROWS)
    real = row_ids < rows
    normalisers = _load_normalisers(statistics, row_ids, real)
    if GRADIENT:
        factor = tl.load(scale + row_ids, mask=real, other=0.0).to(tl.float32)[:, None]
        if TOTAL:
            s = tl.load(total + row_ids, mask=real, other=0.0).to(tl.float32)[:, None]
    if SUMS:
        zeros = tl.zeros((BLOCK_ROWS,), tl.float64)
        divergence, g_sum, clipped_entries, clipped_mass = zeros, zeros, zeros, zeros
        highest = tl.full((BLOCK_ROWS,), _NO_COLUMNS, tl.float32)
    first_column = first + split * tiles_of_split * BLOCK_COLUMNS
    last_column = tl.minimum(columns, first_column + tiles_of_split * BLOCK_COLUMNS)
    for start in range(first_column, last_column, BLOCK_COLUMNS):
        a, b = _logits_tiles(
            student, teacher, weight, teacher_weight, first_row, rows, start, columns, depth, inverse_temperature,
            2, SHARED, DESCRIPTORS, EVEN, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
        )  # fmt: skip
        ids = start + tl.arange(0, BLOCK_COLUMNS)
        inside = (ids < columns)[None, :]
        height, u, q, p = _softmaxes(a, b, normalisers)
        entries, direct = divergence_entries(q, p, u, jsd_weight, KIND)
        clipped = inside & (entries > entry_clip) if CLIP else inside & False
        g = gradient_entries(q, direct, clipped, KIND)
        if SUMS:
            if CLIP:
                entries = tl.minimum(entries, entry_clip)
                clipped_entries += _row_sum(clipped.to(tl.float32), inside)
                clipped_mass += _row_sum(p, clipped)
            divergence += _row_sum(entries, inside)
            if TOTAL:
                g_sum += _row_sum(g, inside)
            highest = tl.maximum(highest, tl.max(tl.where(inside, height, _NO_COLUMNS), axis=1))
        if GRADIENT:
            if TOTAL:
                g -= q * s
            pointers = out + row_ids.to(tl.int64)[:, None] * out_stride + (ids - first)[None, :]
            tl.store(pointers, (factor * g).to(out.dtype.element_ty), mask=real[:, None] & inside)
    if SUMS:
        sums += (split.to(tl.int64) * rows + row_ids) * SUMS_OF_ROW
        store_sums(sums, divergence, g_sum, clipped_entries, clipped_mass, highest, real)


@triton.jit
def cross_entropy_kernel(
    hidden,
    weight,
    statistics,
    labels,
    scale,
    out,
    rows,
    first,
    columns,
    depth,
    first_id,
    out_stride,
    tiles_of_split,
    inverse_temperature,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Gradient of the weighted cross-entropy over columns [first, columns): scale (q - onehot(label))."""
    first_row = tl.program_id(0) * BLOCK_ROWS
    split = tl.program_id(1)
    row_ids = first_row + tl.arange(0, BLOCK_ROWS)
    real = row_ids < rows
    maximum = tl.load(statistics + row_ids * 2, mask=real, other=0.0).to(tl.float32)[:, None]
    log_sum = tl.load(statistics + row_ids * 2 + 1, mask=real, other=0.0).to(tl.float32)[:, None]
    label = (tl.load(labels + row_ids, mask=real, other=-1) - first_id)[:, None]
    factor = tl.load(scale + row_ids, mask=real, other=0.0).to(tl.float32)[:, None]
    first_column = first + split * tiles_of_split * BLOCK_COLUMNS
    last_column = tl.minimum(columns, first_column + tiles_of_split * BLOCK_COLUMNS)
    for start in range(first_column, last_column, BLOCK_COLUMNS):
        a, _ = _logits_tiles(
            hidden, hidden, weight, weight, first_row, rows, start, columns, depth, inverse_temperature,
            1, True, DESCRIPTORS, EVEN, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
        )  # fmt: skip
        ids = start + tl.arange(0, BLOCK_COLUMNS)
        g = tl.exp(a - maximum - log_sum) - tl.where(ids[None, :] == label, 1.0, 0.0)
        pointers = out + row_ids.to(tl.int64)[:, None] * out_stride + (ids - first)[None, :]
        tl.store(pointers, (factor * g).to(out.dtype.element_ty), mask=real[:, None] & (ids < columns)[None, :])
