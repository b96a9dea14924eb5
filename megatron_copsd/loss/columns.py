"""How many columns of the logits' gradient exist at once where no logits do."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from copsd_kernels.gemm import compute_dtype, operand_dtype
from megatron_copsd.errors import UserError, describe

# Where the caller sets no budget: at 8192 rows in bfloat16 6144 columns, and the products' scratch.
_DEFAULT_BYTES = 128 << 20

_MIB = 1 << 20

# Columns are taken in multiples of this many where the budget allows.
_COLUMN_MULTIPLE = 128


@dataclass(frozen=True)
class ColumnPlan:
    """Buffers that the gradients need.

    Attributes:
        columns: of the logits' gradient that exist at once.
        scratch_rows: rows of the products' scratch; 0 where they need none.
        bytes: of both.
    """

    columns: int
    scratch_rows: int
    bytes: int


def plan_columns(rows: int, weight: Tensor, scratch_bytes: int | None) -> ColumnPlan:
    """Return the largest buffers within the budget for R = ``rows`` and this shard of the weight, padding counted.

    Raises:
        UserError: not even one column fits.
    """
    width, hidden_size = weight.shape
    budget = _DEFAULT_BYTES if scratch_bytes is None else scratch_bytes
    item = compute_dtype(weight).itemsize
    scratch_rows = 0
    if weight.dtype != compute_dtype(weight):
        scratch_rows = min(max(rows, width), max(1, budget // 4 // (hidden_size * item)))
    fixed, column_bytes = scratch_rows * hidden_size * item, rows * operand_dtype(weight).itemsize
    columns = min(width, (budget - fixed) // column_bytes)
    if columns < 1:
        rule = f"one column of the logits' gradient, {rows} rows, takes {(fixed + column_bytes) / _MIB:.2f} MiB"
        raise UserError(describe("loss.scratch_mb", budget / _MIB, rule, "Raise the budget."))
    if columns > _COLUMN_MULTIPLE:
        columns -= columns % _COLUMN_MULTIPLE
    return ColumnPlan(columns, scratch_rows, fixed + columns * column_bytes)
