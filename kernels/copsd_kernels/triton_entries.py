"""Entries of a divergence's sum over the vocabulary and of its gradient, and what is stored of each row, in Triton.

``rows`` has the notation, ``rows.RowKernels.divergence_rows_`` the equations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from copsd_kernels.rows import MAX_JSD_LOG_RATIO, TIE, RowSum, Statistic

KIND_CODES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}

_FORWARD_KL = tl.constexpr(KIND_CODES["forward_kl"])
_REVERSE_KL = tl.constexpr(KIND_CODES["reverse_kl"])
_MAX_JSD_LOG_RATIO = tl.constexpr(MAX_JSD_LOG_RATIO)
_TIE = tl.constexpr(TIE)

# Columns of ``Statistic`` and of ``RowSum``, as kernels can read them, and how many there are of each.
STATISTICS = tl.constexpr(len(Statistic))
_MAXIMUM = tl.constexpr(int(Statistic.MAXIMUM))
_SUM = tl.constexpr(int(Statistic.SUM))
_WEIGHTED_SUM = tl.constexpr(int(Statistic.WEIGHTED_SUM))
SUMS_OF_ROW = tl.constexpr(len(RowSum))
_DIVERGENCE = tl.constexpr(int(RowSum.DIVERGENCE))
_TOTAL = tl.constexpr(int(RowSum.TOTAL))
_CLIPPED_ENTRIES = tl.constexpr(int(RowSum.CLIPPED_ENTRIES))
_CLIPPED_TEACHER_MASS = tl.constexpr(int(RowSum.CLIPPED_TEACHER_MASS))
_TOP1_AGREEMENT = tl.constexpr(int(RowSum.TOP1_AGREEMENT))


@triton.jit
def _expm1(u):
    """exp(u) - 1 without cancellation near 0: below 1/2 the Taylor series, whose rest is below 1e-8 u."""
    series = 1 / 120 + u * (1 / 720 + u * (1 / 5040 + u * (1 / 40320)))
    series = u * (1.0 + u * (1 / 2 + u * (1 / 6 + u * (1 / 24 + u * series))))
    return tl.where(tl.abs(u) < 0.5, series, tl.exp(u) - 1.0)


@triton.jit
def _log1p(y):
    """log(1 + y) without cancellation near 0: below 1/2 the series of 2 artanh(y / (2 + y)), its rest below 2e-8 y."""
    s = tl.where(tl.abs(y) < 0.5, y / (2.0 + y), 0.0)
    t = s * s
    series = 1 / 9 + t * (1 / 11 + t * (1 / 13))
    series = 1.0 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * series)))
    return tl.where(tl.abs(y) < 0.5, 2.0 * s * series, tl.log(1.0 + y))


@triton.jit
def divergence_entries(q, p, u, jsd_weight, KIND: tl.constexpr):
    """Entries l_v of the sum, and what their gradient needs of them."""
    if KIND == _FORWARD_KL:
        return p * u, p
    elif KIND == _REVERSE_KL:
        return -(q * u), u
    else:
        # Through u alone, the mixture m is never formed: it may underflow where r = log(q / m) does not.
        u = tl.minimum(u, _MAX_JSD_LOG_RATIO)
        r = -_log1p(jsd_weight * _expm1(u))
        student_part = (1.0 - jsd_weight) * (q * r)
        return jsd_weight * (p * (u + r)) + student_part, student_part


@triton.jit
def gradient_entries(q, direct, clipped, KIND: tl.constexpr):
    """Gradient entries G_v from what ``divergence_entries`` returned second."""
    if KIND == _FORWARD_KL:
        return q - tl.where(clipped, 0.0, direct)
    elif KIND == _REVERSE_KL:
        return -(q * tl.where(clipped, 1.0, direct))
    else:
        return tl.where(clipped, 0.0, direct)


@triton.jit
def store_statistics(parts, m, d, c, mask):
    """Store a part of the softmax statistics of the rows that begin at ``parts``."""
    tl.store(parts + _MAXIMUM, m.to(tl.float64), mask=mask)
    tl.store(parts + _SUM, d, mask=mask)
    tl.store(parts + _WEIGHTED_SUM, c, mask=mask)


@triton.jit
def store_sums(sums, divergence, total, clipped_entries, clipped_mass, highest, mask):
    """Store the sums of the rows that begin at ``sums``; ``highest`` is the largest of a + b less both maxima."""
    tl.store(sums + _DIVERGENCE, divergence, mask=mask)
    tl.store(sums + _TOTAL, total, mask=mask)
    tl.store(sums + _CLIPPED_ENTRIES, clipped_entries, mask=mask)
    tl.store(sums + _CLIPPED_TEACHER_MASS, clipped_mass, mask=mask)
    tl.store(sums + _TOP1_AGREEMENT, tl.where(highest > -_TIE, 1.0, 0.0).to(tl.float64), mask=mask)
