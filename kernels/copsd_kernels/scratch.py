"""How large the buffers of a fused loss are: plain arithmetic, shared by the walk that makes them and by the planner.

``chunks`` explains what chunks and groups are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_copsd.errors import UserError, describe

# Where the caller sets no budget. On CPU as many rows as matrix products need to run at full speed (measured: 96 rows
# reach two thirds of it, 192 nearly all). On CUDA bytes: chunks of about 512 rows in groups of 2048 at V = 151936.
_DEFAULT_CPU_ROWS = 192
_DEFAULT_CUDA_BYTES = 1280 << 20

_CHUNKS_PER_GROUP = 4

# Elements of one elementwise operation in plain torch. On CPU a block of rows and its scratch should stay in the last
# cache level; on CUDA a block should outlast the launch of its kernel.
_BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}

# Chunks are a multiple of this many rows where the budget allows, which matrix products prefer.
_ROW_MULTIPLE = {"cpu": 8, "cuda": 64}

_MIB = 1 << 20


@dataclass(frozen=True)
class ScratchShape:
    """What decides the buffers of one walk over rows.

    Attributes:
        views: hidden states that meet the output layer: 2 for a divergence, 1 for a cross-entropy.
        rows: R, response rows of the walk.
        width: V_local, rows of the weight's shard, padding of the vocabulary included.
        columns: those of them that are vocabulary entries.
        hidden: H.
        item: bytes of a logit.
        operand_item: bytes of an element that enters the products.
        weight_item: bytes of an element of the weight.
        work_buffers: blocks of scratch that the row functions need.
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
    device: Literal["cpu", "cuda"]

    @property
    def in_place(self) -> bool:
        """Whether the logits' gradient is written over the logits."""
        return self.operand_item == self.item or not self.differentiate


@dataclass(frozen=True)
class ScratchSizes:
    """Rows of each buffer.

    Attributes:
        chunk: of each [chunk, V_valid] of logits.
        group: of each [group, H] of hidden states, and of the [group, V_valid] of the logits' gradient.
        block: of each [block, V_valid] of work.
        tile: of the [tile, H] of upcast weight; 0 where there is none.
        bytes: of all buffers together.
    """

    chunk: int
    group: int
    block: int
    tile: int
    bytes: int


def scratch_sizes(shape: ScratchShape, scratch_bytes: int | None) -> ScratchSizes:
    """Size the buffers to at most ``scratch_bytes``, by what is equal on all ranks: padding counts against the budget.

    Args:
        shape: of the walk; at least one row.
        scratch_bytes: budget of all buffers together; None for the device's default.

    Raises:
        UserError: not even one row fits.
    """
    item, width, hidden = shape.item, shape.width, shape.hidden
    budget = _default_budget(shape) if scratch_bytes is None else scratch_bytes
    tile = min(width, max(1, budget // 8 // (hidden * item))) if shape.weight_item != item else 0
    block = 0
    if shape.work_buffers > 0:
        by_budget = budget // 4 // (shape.work_buffers * width * item)
        block = max(1, min(shape.rows, _BLOCK_ELEMENTS[shape.device] // width, by_budget))
    fixed_bytes = tile * hidden * item + shape.work_buffers * block * width * item
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
        + shape.work_buffers * block * columns * item
        + tile * hidden * item
    )
    return ScratchSizes(chunk, group, block, tile, total)


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
