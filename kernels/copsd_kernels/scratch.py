"""How large the buffers of a fused loss are: plain arithmetic, shared by the walks that make them and by the planner.

A walk over chunks of rows (``torch``, ``chunk``) has a ``ChunkPlan``, a walk over columns (``streaming``) a
``ColumnPlan``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_copsd.errors import UserError, describe

# Where the caller sets no budget. On CPU as many rows as matrix products need to run at full speed (measured: 96 rows
# reach two thirds of it, 192 nearly all). On CUDA bytes: chunks of about 512 rows in groups of 2048 at V = 151936.
_DEFAULT_CPU_ROWS = 192
_DEFAULT_CUDA_BYTES = 1280 << 20

# The same for streaming: at 8192 rows in bfloat16 6144 columns, and the products' scratch.
_DEFAULT_STREAMING_BYTES = 128 << 20

# Blocks of scratch that the row kernels of each implementation need: ``rows.RowKernels.WORK_BUFFERS``.
WORK_BUFFERS = {"torch": 3, "chunk": 0}

_CHUNKS_PER_GROUP = 4

# Elements of one elementwise operation in plain torch. On CPU a block of rows and its scratch should stay in the last
# cache level; on CUDA a block should outlast the launch of its kernel.
_BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}

# Chunks are a multiple of this many rows where the budget allows, which matrix products prefer.
_ROW_MULTIPLE = {"cpu": 8, "cuda": 64}

# Columns of streaming are, likewise, a multiple of this many.
_COLUMN_MULTIPLE = 128

_MIB = 1 << 20


@dataclass(frozen=True)
class ScratchShape:
    """What decides the buffers of one walk.

    Attributes:
        views: hidden states that meet the output layer: 2 for a divergence, 1 for a cross-entropy.
        rows: R, response rows of the walk; at least one.
        width: V_local, rows of the weight's shard, padding of the vocabulary included.
        columns: those of them that are vocabulary entries.
        hidden: H.
        item: bytes of a logit.
        operand_item: bytes of an element that enters the products.
        weight_item: bytes of an element of the weight.
        work_buffers: blocks of scratch that the row kernels need, see ``WORK_BUFFERS``.
        differentiate: whether a gradient is wanted.
        device: ``cpu`` or ``cuda``.
    """

    views: int
    rows: int
    width: int
    columns: int
    hidden: int
    item: int
    operand_item: int
    weight_item: int
    work_buffers: int
    differentiate: bool
    device: str

    @property
    def in_place(self) -> bool:
        """Whether the logits' gradient is written over the logits."""
        return self.operand_item == self.item or not self.differentiate


@dataclass(frozen=True)
class ChunkPlan:
    """Buffers of a walk over chunks of rows.

    Attributes:
        rows: C, of a chunk: of each view's logits [C, V_valid].
        group_rows: G, of a group of chunks: of each view's hidden states [G, H], and of the logits' gradient
            [G, V_valid] where it has a buffer of its own.
        in_place: whether the logits' gradient is written over the logits instead.
        work_buffers: how many [block_rows, V_valid] the row kernels work in.
        block_rows: of each of them.
        product_rows: of the products' scratch [product_rows, H]; 0 where they need none.
        bytes: of all buffers together.
    """

    rows: int
    group_rows: int
    in_place: bool
    work_buffers: int
    block_rows: int
    product_rows: int
    bytes: int


@dataclass(frozen=True)
class ColumnPlan:
    """Buffers of a walk over columns, which the gradients alone need: all 0 without them.

    Attributes:
        columns: of the logits' gradient [R, columns] that exist at once.
        product_rows: of the products' scratch [product_rows, H]; 0 where they need none.
        bytes: of both.
    """

    columns: int
    product_rows: int
    bytes: int


def plan_chunks(shape: ScratchShape, scratch_bytes: int | None) -> ChunkPlan:
    """Return the largest buffers within the budget, sized by what is equal on all ranks: padding counts against it.

    Args:
        shape: of the walk.
        scratch_bytes: budget of all buffers together; None for the device's default.

    Raises:
        UserError: not even one row fits.
    """
    item, width, hidden, buffers = shape.item, shape.width, shape.hidden, shape.work_buffers
    budget = _default_budget(shape) if scratch_bytes is None else scratch_bytes
    product_rows = min(width, max(1, budget // 8 // (hidden * item))) if shape.weight_item != item else 0
    block = 0
    if buffers > 0:
        by_budget = budget // 4 // (buffers * width * item)
        block = max(1, min(shape.rows, _BLOCK_ELEMENTS[shape.device] // width, by_budget))
    fixed_bytes = product_rows * hidden * item + buffers * block * width * item
    chunks_per_group = 1 if shape.in_place else _CHUNKS_PER_GROUP
    group_row_bytes = shape.views * hidden * shape.operand_item + (0 if shape.in_place else width * shape.operand_item)
    row_bytes = shape.views * width * item + chunks_per_group * group_row_bytes
    largest = (budget - fixed_bytes) // row_bytes
    if largest < 1:
        rule = f"one row of {width} logits and its buffers takes {(fixed_bytes + row_bytes) / _MIB:.2f} MiB"
        raise UserError(describe("loss.scratch_mb", budget / _MIB, rule, "Raise the budget."))
    chunk = _balance(shape.rows, largest, _ROW_MULTIPLE[shape.device])
    group = min(shape.rows, chunk * chunks_per_group)
    columns = shape.columns
    total = (
        shape.views * (chunk * columns * item + group * hidden * shape.operand_item)
        + (0 if shape.in_place else group * columns * shape.operand_item)
        + buffers * block * columns * item
        + product_rows * hidden * item
    )
    return ChunkPlan(chunk, group, shape.in_place, buffers, block, product_rows, total)


def plan_columns(shape: ScratchShape, scratch_bytes: int | None) -> ColumnPlan:
    """Return the largest buffers within the budget, as for ``plan_chunks``.

    Args:
        shape: of the walk; views, columns, work_buffers and device do not matter.
        scratch_bytes: budget of all buffers together; None for the default.

    Raises:
        UserError: not even one column fits.
    """
    if not shape.differentiate:
        return ColumnPlan(0, 0, 0)
    rows, width, hidden, item = shape.rows, shape.width, shape.hidden, shape.item
    budget = _DEFAULT_STREAMING_BYTES if scratch_bytes is None else scratch_bytes
    product_rows = 0
    if shape.weight_item != item:
        product_rows = min(max(rows, width), max(1, budget // 4 // (hidden * item)))
    fixed_bytes, column_bytes = product_rows * hidden * item, rows * shape.operand_item
    columns = min(width, (budget - fixed_bytes) // column_bytes)
    if columns < 1:
        rule = f"one column of the logits' gradient, {rows} rows, takes {(fixed_bytes + column_bytes) / _MIB:.2f} MiB"
        raise UserError(describe("loss.scratch_mb", budget / _MIB, rule, "Raise the budget."))
    if columns > _COLUMN_MULTIPLE:
        columns -= columns % _COLUMN_MULTIPLE
    return ColumnPlan(columns, product_rows, fixed_bytes + columns * column_bytes)


def _default_budget(shape: ScratchShape) -> int:
    """Budget in bytes; on CPU a quarter on top of the logits for what goes with them."""
    row_bytes = shape.views * shape.width * shape.item
    return _DEFAULT_CPU_ROWS * row_bytes * 5 // 4 if shape.device == "cpu" else _DEFAULT_CUDA_BYTES


def _balance(rows: int, largest: int, multiple: int) -> int:
    """Even out the chunks (the last would often be tiny), in multiples where they allow."""
    if largest >= multiple:
        largest -= largest % multiple
    count = -(-rows // largest)
    size = -(-rows // count)
    return min(largest, size + -size % multiple, rows)
