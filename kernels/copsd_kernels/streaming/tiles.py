"""What ``streaming`` launches: products with the output weight and all that follows, tile by tile.

No logits reach memory: not a batch's, not a chunk's, not a row's. What is written is a few numbers a row
(``statistics``, ``divergence``) or the logits' gradient of some columns (``divergence``, ``cross_entropy_dlogits``), in
a buffer that the caller bounds. ``rows`` has the notation and the equations, ``kernels`` the kernels.

Under TRITON_INTERPRET=1 (set before this module is imported) everything runs on CPU tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from copsd_kernels.arguments import FLOATING, Arguments
from copsd_kernels.row_arguments import check_gradient, check_merged
from copsd_kernels.rows import (
    NO_COLUMNS,
    DivergenceTerms,
    LogitsGradient,
    RowSum,
    RowSums,
    SoftmaxStatistics,
    Statistic,
    join_parts,
    normalisers,
)
from copsd_kernels.streaming.kernels import cross_entropy_kernel, divergence_kernel, statistics_kernel
from copsd_kernels.triton_entries import KIND_CODES


@dataclass(frozen=True)
class Tiling:
    """How a program is cut; all powers of two.

    Attributes:
        rows, columns: of a tile of logits.
        depth: of one step along the hidden size.
        warps, stages: of a program; stages of loads are under way at once.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Tiles that load through pointers, by dtype; and through descriptors, which the copy engine of newer GPUs understands,
# by compute capability and dtype, for the kernels that make statistics and those that make entries, which hold more at
# once. Larger tiles, or fewer warps for these, make the compiler spill registers: ``copsd bench compile``.
POINTER_TILINGS = {
    torch.bfloat16: Tiling(rows=64, columns=64, depth=64, warps=8, stages=3),
    torch.float32: Tiling(rows=64, columns=64, depth=32, warps=8, stages=2),
}
STATISTICS_TILINGS = {
    (90, torch.bfloat16): Tiling(rows=64, columns=128, depth=64, warps=8, stages=4),
    (100, torch.bfloat16): Tiling(rows=64, columns=128, depth=64, warps=8, stages=4),
}
ENTRIES_TILINGS = {
    (90, torch.bfloat16): Tiling(rows=64, columns=128, depth=64, warps=8, stages=4),
    (100, torch.bfloat16): Tiling(rows=64, columns=64, depth=64, warps=8, stages=4),
}

# Left to itself the compiler spills a few registers of some kernels so that two programs would fit on a processor,
# where shared memory has room for one.
MAX_REGISTERS = 255

# What a descriptor needs of addresses and of rows, in bytes.
_DESCRIPTOR_ALIGNMENT = 16

# Of the columns, at most: each leaves its own part of the sums of every row.
MAX_SPLITS = 32


@dataclass(frozen=True)
class Operand:
    """A matrix that enters the products, and the weight it is multiplied with.

    Attributes:
        hidden: [R, H], contiguous, bfloat16 or float32.
        weight: [V_local, H], contiguous; cast to the dtype of ``hidden`` tile by tile.
    """

    hidden: Tensor
    weight: Tensor


def statistics(
    views: tuple[Operand, ...], temperature: float, labels: Tensor | None = None, first_id: int = 0
) -> Tensor:
    """Shard's part of the softmax statistics of each view, and of the label's logit.

    Args:
        views: one or two, all with the same R, H and V_local; V_local may be 0.
        temperature: divides the logits.
        labels: [R] int64 vocabulary ids; with one view only.
        first_id: vocabulary id of the weight's first row.

    Returns:
        [R, 3 views (+ 1)] float64: for each view the columns of ``Statistic``, then the label's logit over the
        temperature, 0 where this shard does not hold it.

    Raises:
        UserError: an argument breaks its rule.
    """
    check = Arguments("statistics")
    check.integer("views", len(views), 1, 2 if labels is None else 1)
    for view in views:
        _check_operand(check, "views", view)
    check.number("temperature", temperature)
    if labels is not None:
        check.tensor("labels", labels, "R", (torch.int64,), unit_stride=True)
    check.integer("first_id", first_id, 0)
    (rows, depth), columns = views[0].hidden.shape, views[0].weight.shape[0]
    of_views = len(Statistic) * len(views)
    launch = _Launch.of(views, columns, STATISTICS_TILINGS)
    parts = torch.zeros(
        launch.splits, rows, of_views + (labels is not None), dtype=torch.float64, device=views[0].hidden.device
    )
    parts[:, :, Statistic.MAXIMUM : of_views : len(Statistic)] = NO_COLUMNS
    if columns > 0:
        statistics_kernel[launch.programs](
            *launch.matrices(views), parts if labels is None else labels, parts,
            rows, columns, depth, first_id, launch.tiles_of_split, 1 / temperature,
            VIEWS=len(views), SHARED=views[-1].weight is views[0].weight, LABELS=labels is not None,
            **launch.constants(depth),
        )  # fmt: skip
    joined = [join_parts(part) for part in parts[:, :, :of_views].split(len(Statistic), dim=2)]
    return torch.cat([*joined, parts[:, :, of_views:].sum(dim=0)], dim=1)


def divergence(
    student: Operand,
    teacher: Operand,
    student_statistics: SoftmaxStatistics,
    teacher_statistics: SoftmaxStatistics,
    terms: DivergenceTerms,
    columns: slice,
    *,
    sums: bool,
    gradient: LogitsGradient | None = None,
) -> RowSums:
    """Sums and gradient of ``RowKernels.divergence_rows_`` and ``divergence_dlogits_``, over some columns.

    Args:
        student, teacher: hidden states and weights.
        student_statistics, teacher_statistics: of the whole vocabulary.
        terms: which divergence.
        columns: of this shard.
        sums: whether they are wanted.
        gradient: where its ``out`` [R, columns] goes, if one is wanted.

    Returns:
        The sums of all R rows; 0 where none are wanted.

    Raises:
        UserError: an argument breaks its rule.
    """
    check = Arguments("divergence")
    _check_operand(check, "student", student)
    _check_operand(check, "teacher", teacher)
    check_merged(check, "student_statistics", student_statistics, "R")
    check_merged(check, "teacher_statistics", teacher_statistics, "R")
    check.instance("terms", terms, DivergenceTerms)
    check.instance("sums", sums, bool)
    _check_columns(check, columns, student)
    if gradient is not None:
        check_gradient(check, gradient, terms, "R columns")
    rows, depth = student.hidden.shape
    launch = _Launch.of((student, teacher), columns.stop - columns.start, ENTRIES_TILINGS)
    parts = torch.zeros(
        launch.splits, rows if sums else 0, len(RowSum), dtype=torch.float64, device=student.hidden.device
    )
    if columns.stop > columns.start:
        merged = normalisers(student_statistics, teacher_statistics)
        # An argument that its flags switch off still needs a pointer.
        divergence_kernel[launch.programs](
            *launch.matrices((student, teacher)), merged, parts if sums else merged,
            merged if gradient is None else gradient.out,
            merged if gradient is None else gradient.scale,
            merged if gradient is None or gradient.total is None else gradient.total,
            rows, columns.start, columns.stop, depth, 0 if gradient is None else gradient.out.stride(0),
            launch.tiles_of_split, 1 / terms.temperature, terms.jsd_weight,
            0.0 if terms.entry_clip is None else terms.entry_clip,
            KIND=KIND_CODES[terms.kind], CLIP=terms.entry_clip is not None, TOTAL=not terms.total_is_zero,
            SUMS=sums, GRADIENT=gradient is not None, SHARED=teacher.weight is student.weight,
            **launch.constants(depth),
        )  # fmt: skip
    return RowSums(parts.sum(dim=0)) if sums else RowSums.zeros(rows, parts.device)


def cross_entropy_dlogits(
    operand: Operand,
    merged: SoftmaxStatistics,
    labels: Tensor,
    first_id: int,
    temperature: float,
    scale: Tensor,
    columns: slice,
    out: Tensor,
) -> None:
    """Write the gradient of ``RowKernels.cross_entropy_dlogits_`` over some columns into ``out``, [R, columns].

    ``scale`` is [R] float64, row weight / temperature; the other arguments are those of ``statistics``.

    Raises:
        UserError: an argument breaks its rule.
    """
    check = Arguments("cross_entropy_dlogits")
    _check_operand(check, "operand", operand)
    check_merged(check, "merged", merged, "R")
    check.tensor("labels", labels, "R", (torch.int64,), unit_stride=True)
    check.integer("first_id", first_id, 0)
    check.number("temperature", temperature)
    check.tensor("scale", scale, "R", (torch.float64,), unit_stride=True)
    _check_columns(check, columns, operand)
    check.tensor("out", out, "R columns", FLOATING, unit_stride=True)
    (rows, depth), width = operand.hidden.shape, columns.stop - columns.start
    if width == 0:
        return
    launch = _Launch.of((operand,), width, ENTRIES_TILINGS)
    hidden, _, weight, _ = launch.matrices((operand,))
    cross_entropy_kernel[launch.programs](
        hidden, weight, normalisers(merged), labels, scale, out,
        rows, columns.start, columns.stop, depth, first_id, out.stride(0), launch.tiles_of_split, 1 / temperature,
        **launch.constants(depth),
    )  # fmt: skip


def _check_operand(check: Arguments, name: str, operand: Operand) -> None:
    check.instance(name, operand, Operand)
    check.tensor(f"{name}.hidden", operand.hidden, "R H", tuple(POINTER_TILINGS), unit_stride=True)
    check.tensor(f"{name}.weight", operand.weight, "V_local H", FLOATING, unit_stride=True)
    for matrix in (operand.hidden, operand.weight):
        if not matrix.is_contiguous():
            check.refuse(name, matrix.stride(), "must be contiguous", "Pass Tensor.contiguous().")


def _check_columns(check: Arguments, columns: slice, operand: Operand) -> None:
    check.instance("columns", columns, slice)
    check.integer("columns", columns.stop, 0, operand.weight.shape[0])
    check.integer("columns", columns.start, 0, columns.stop)
    check.fix("columns", columns.stop - columns.start, "columns")


@dataclass(frozen=True)
class _Launch:
    """Programs of one launch: blocks of rows times splits of the columns, each a run of whole tiles."""

    tiling: Tiling
    descriptors: bool
    row_blocks: int
    splits: int
    tiles_of_split: int

    @classmethod
    def of(cls, views: tuple[Operand, ...], columns: int, tilings: dict[tuple[int, torch.dtype], Tiling]) -> _Launch:
        """Choose tiles for the device, and as many splits as let all programs end at about the same time.

        Programs next to each other have the same columns and the next rows: they share the weight's tile in the cache.
        """
        hidden = views[0].hidden
        tiling = tilings.get((_generation(hidden.device), hidden.dtype)) if _suits_descriptors(views) else None
        descriptors, tiling = tiling is not None, tiling or POINTER_TILINGS[hidden.dtype]
        row_blocks, tiles = triton.cdiv(hidden.shape[0], tiling.rows), max(1, triton.cdiv(columns, tiling.columns))
        processors = _processors(hidden.device)

        def tiles_one_after_another(splits: int) -> int:
            return int(triton.cdiv(row_blocks * splits, processors) * triton.cdiv(tiles, splits))

        splits = min(range(1, min(tiles, MAX_SPLITS) + 1), key=tiles_one_after_another)
        tiles_of_split = triton.cdiv(tiles, splits)
        return cls(tiling, descriptors, row_blocks, triton.cdiv(tiles, tiles_of_split), tiles_of_split)

    @property
    def programs(self) -> tuple[int, int]:
        return self.row_blocks, self.splits

    def matrices(self, views: tuple[Operand, ...]) -> tuple[Tensor | TensorDescriptor, ...]:
        """Student's and teacher's hidden states, then their weights, as the kernels take them."""
        hidden = [view.hidden for view in (views[0], views[-1])]
        weights = [view.weight for view in (views[0], views[-1])]
        if not self.descriptors:
            return *hidden, *weights
        blocks = [[self.tiling.rows, self.tiling.depth]] * 2 + [[self.tiling.columns, self.tiling.depth]] * 2
        return tuple(
            TensorDescriptor.from_tensor(matrix, block)
            for matrix, block in zip((*hidden, *weights), blocks, strict=True)
        )

    def constants(self, depth: int) -> dict[str, int | bool]:
        """What the kernels are compiled for."""
        return {
            "DESCRIPTORS": self.descriptors,
            "EVEN": depth % self.tiling.depth == 0,
            "BLOCK_ROWS": self.tiling.rows,
            "BLOCK_COLUMNS": self.tiling.columns,
            "BLOCK_DEPTH": self.tiling.depth,
            "num_warps": self.tiling.warps,
            "num_stages": self.tiling.stages,
            "maxnreg": MAX_REGISTERS,
        }


def _suits_descriptors(views: tuple[Operand, ...]) -> bool:
    """Whether all matrices are aligned as descriptors need them."""
    matrices = [matrix for view in views for matrix in (view.hidden, view.weight)]
    return all(
        matrix.data_ptr() % _DESCRIPTOR_ALIGNMENT == 0
        and matrix.shape[1] * matrix.itemsize % _DESCRIPTOR_ALIGNMENT == 0
        for matrix in matrices
    )


def _generation(device: torch.device) -> int:
    """Compute capability as the tilings name it: 80 for whatever is older than Hopper."""
    if device.type != "cuda":
        return 80
    major, _ = torch.cuda.get_device_capability(device)
    return min(100, 10 * max(8, major))


def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1
