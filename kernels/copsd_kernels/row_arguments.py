"""What the row kernels check of their arguments, in torch and in Triton: the contract of ``rows.RowKernels``."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from copsd_kernels.arguments import FLOATING, Arguments
from copsd_kernels.rows import DivergenceTerms, LogitsGradient, SoftmaxStatistics


def check_statistics(logits: Tensor, temperature: float, work: Tensor, dtypes: Collection[torch.dtype]) -> None:
    """Check the arguments of ``RowKernels.statistics``; ``dtypes`` are those that an implementation takes.

    Raises:
        UserError: one breaks its rule.
    """
    check = Arguments("statistics")
    _check_logits(check, {"logits": logits}, work, dtypes)
    check.number("temperature", temperature)


def check_divergence(
    student: Tensor,
    teacher: Tensor,
    student_statistics: SoftmaxStatistics,
    teacher_statistics: SoftmaxStatistics,
    terms: DivergenceTerms,
    work: Tensor,
    gradient: LogitsGradient | None,
    dtypes: Collection[torch.dtype],
) -> None:
    """Check the arguments of ``RowKernels.divergence_rows_``; ``dtypes`` as for ``check_statistics``.

    Raises:
        UserError: one breaks its rule.
    """
    check = Arguments("divergence_rows_")
    _check_logits(check, {"student": student, "teacher": teacher}, work, dtypes)
    check_merged(check, "student_statistics", student_statistics)
    check_merged(check, "teacher_statistics", teacher_statistics)
    check.instance("terms", terms, DivergenceTerms)
    if gradient is not None:
        check_gradient(check, gradient, terms)


def check_cross_entropy(
    logits: Tensor,
    merged: SoftmaxStatistics,
    labels: Tensor,
    first_id: int,
    temperature: float,
    scale: Tensor,
    out: Tensor,
    work: Tensor,
    dtypes: Collection[torch.dtype],
) -> None:
    """Check the arguments of ``RowKernels.cross_entropy_dlogits_``; ``dtypes`` as for ``check_statistics``.

    Raises:
        UserError: one breaks its rule.
    """
    check = Arguments("cross_entropy_dlogits_")
    _check_logits(check, {"logits": logits}, work, dtypes)
    check_merged(check, "merged", merged)
    check.tensor("labels", labels, "C", (torch.int64,), unit_stride=True)
    check.integer("first_id", first_id, 0)
    check.number("temperature", temperature)
    check.tensor("scale", scale, "C", (torch.float64,), unit_stride=True)
    check.tensor("out", out, "C V_local", FLOATING, unit_stride=True)


def check_merged(check: Arguments, name: str, merged: SoftmaxStatistics, shape: str = "C") -> None:
    """Check statistics of as many rows as ``shape`` says.

    Raises:
        UserError: they break their rule.
    """
    check.instance(name, merged, SoftmaxStatistics)
    for field in ("maximum", "log_sum"):
        check.tensor(f"{name}.{field}", getattr(merged, field), shape, (torch.float64,))


def check_gradient(
    check: Arguments, gradient: LogitsGradient, terms: DivergenceTerms, shape: str = "C V_local"
) -> None:
    """Check where the gradient goes, whose shape this is, and what it is made from.

    Raises:
        UserError: it breaks its rule.
    """
    check.instance("gradient", gradient, LogitsGradient)
    rows = shape.split()[0]
    check.tensor("gradient.scale", gradient.scale, rows, (torch.float64,), unit_stride=True)
    if gradient.total is not None or not terms.total_is_zero:
        check.tensor("gradient.total", gradient.total, rows, (torch.float64,), unit_stride=True)
    check.tensor("gradient.out", gradient.out, shape, FLOATING, unit_stride=True)


def _check_logits(
    check: Arguments, logits: Mapping[str, Tensor], work: Tensor, dtypes: Collection[torch.dtype]
) -> None:
    for name, value in logits.items():
        check.tensor(name, value, "C V_local", dtypes, unit_stride=True)
        dtypes = (value.dtype,)
    check.tensor("work", work, "buffers block V_local", dtypes)
