"""``copsd bench kernels --explain``: what each implementation must spend on a case, by arithmetic, and its limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from copsd_kernels.gemm import compute_dtype, operand_dtype
from copsd_kernels.scratch import ChunkPlan, ColumnPlan
from copsd_tools.bench.kernels.cases import Case
from copsd_tools.bench.kernels.catalogue import FLOOR
from copsd_tools.bench.kernels.explain.devices import DEVICES, Device
from copsd_tools.bench.kernels.measuring.floor import memory_bytes
from copsd_tools.bench.kernels.measuring.measure import gradient_bytes
from copsd_tools.bench.kernels.measuring.worker import milliseconds
from copsd_tools.bench.kernels.results.report import describe_setting
from copsd_tools.bench.kernels.subjects.implementation import (
    FusedOptions,
    Implementation,
    fake_weight,
    scratch_bytes,
    taken,
)
from copsd_tools.bench.kernels.subjects.registry import SUBJECTS
from megatron_copsd.loss.implementation import plan_scratch

_MIB = 1 << 20
_TERA, _GIGA = 1e12, 1e9
_FLOAT32, _FLOAT64 = 4, 8
_COPIED_BYTES = 256 * _MIB
_REPEATS = 5


@dataclass(frozen=True)
class Cost:
    """What one implementation spends on one rank's shard of a case.

    Attributes:
        units: matrix products of 2 R H V_local operations.
        scratch_bytes: of its buffers besides inputs and gradients; None where it is not known.
        is_bound: whether that is only a lower bound, the logits that it holds at once.
        gradient_bytes: gradients as they are returned, with their float32 accumulators.
        traffic_bytes: read and written by all that is no matrix product; None where it is not known.
    """

    units: int
    scratch_bytes: int | None
    is_bound: bool
    gradient_bytes: int
    traffic_bytes: int | None


def find_device(name: str, case: Case, tflops: float | None, gbytes: float | None) -> Device:
    """The device that has this name, or else this machine's, measured; with the speeds that are given instead."""
    device = next((device for known, device in DEVICES.items() if known in name), None)
    if device is None:
        found = {case.dtype: tflops or _measured_tflops(case)}
        device = Device(name, found, gbytes or _measured_gbytes(case), memory_bytes(case.device) / _GIGA)
    return replace(device, tflops={case.dtype: tflops} if tflops else device.tflops, gbytes=gbytes or device.gbytes)


def cost_table(case: Case, names: Sequence[str], device: Device) -> Table:
    """One line for each implementation of a case, the floor first; below, those that cannot compute it.

    Raises:
        UserError: the case's budget of scratch does not hold a row.
    """
    subject, tflops = SUBJECTS[case.what], device.tflops[case.dtype]
    unit = 2 * case.rows * case.hidden * case.local_vocab
    unit_ms = 1e3 * unit / (tflops * _TERA)
    table = Table(title=f"R = {case.rows}, {describe_setting(case)}", box=box.SIMPLE_HEAD, pad_edge=False)
    table.collapse_padding, table.caption_justify = True, "left"
    table.add_column("", no_wrap=True)
    for heading in ("units", "GEMM\nms", "traffic\nGB", "traffic\nms", "grads\nMiB", "scratch\nMiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("limited\nby", no_wrap=True)
    floor = subject.floor_units(case)
    table.add_row(FLOOR, str(floor), f"{floor * unit_ms:.4g}", "", "", "", "", "products")
    refusals = []
    for name in names:
        implementation = subject.implementations[name]
        refusal = implementation.refuses(case)
        if refusal is None:
            table.add_row(name, *_cells(case, cost(case, implementation), unit_ms, device))
        else:
            refusals.append(f"\n{name}: {refusal}")
    table.caption = Text(
        f"{device.name}: {tflops:.4g} TFLOP/s, {device.gbytes:.4g} GB/s, {device.memory:.4g} GB. A unit is 2 R H V = "
        f"{unit / _TERA:.4g} TFLOP, {unit_ms:.4g} ms. Inputs {input_bytes(case) / _MIB:.1f} MiB, gradients as all "
        f"return them {gradient_bytes(case) / _MIB:.1f} MiB, logits of all rows "
        f"{logits_bytes(case, case.rows) / _MIB:.1f} MiB." + "".join(refusals)
    )
    return table


def _cells(case: Case, found: Cost, unit_ms: float, device: Device) -> list[str]:
    """Everything of a line but its name."""
    products_ms = found.units * unit_ms
    traffic_ms = None if found.traffic_bytes is None else 1e3 * found.traffic_bytes / (device.gbytes * _GIGA)
    held = input_bytes(case) + found.gradient_bytes + (found.scratch_bytes or 0)
    limit = "products" if products_ms >= (traffic_ms or 0) else "traffic"
    if held > device.memory * _GIGA:
        limit = "capacity"
    scratch = "" if found.scratch_bytes is None else f"{found.scratch_bytes / _MIB:.4g}"
    return [
        str(found.units),
        f"{products_ms:.4g}",
        "" if found.traffic_bytes is None else f"{found.traffic_bytes / _GIGA:.4g}",
        "" if traffic_ms is None else f"{traffic_ms:.4g}",
        f"{found.gradient_bytes / _MIB:.4g}",
        f"≥ {scratch}" if found.is_bound else scratch,
        limit if traffic_ms is not None or held > device.memory * _GIGA else "",
    ]


def cost(case: Case, implementation: Implementation) -> Cost:
    """What an implementation spends.

    Raises:
        UserError: the case's budget of scratch does not hold a row.
    """
    units = SUBJECTS[case.what].floor_units(case) + implementation.extra_units(case)
    if implementation.fused is None:
        rows = implementation.dense_rows(case)
        held = None if rows is None else logits_bytes(case, rows)
        return Cost(units, held, held is not None, gradient_bytes(case), None)
    plan = fused_scratch(case, implementation.fused)
    traffic = (streaming_traffic_bytes if isinstance(plan, ColumnPlan) else chunked_traffic_bytes)(
        case, implementation.fused, plan
    )
    return Cost(units, plan.bytes, False, fused_gradient_bytes(case), traffic)


def fused_scratch(case: Case, options: FusedOptions) -> ChunkPlan | ColumnPlan:
    """The buffers that the loss would allocate; no device is needed."""
    subject = SUBJECTS[case.what]
    return plan_scratch(
        taken(options, case),
        fake_weight(case),
        case.rows,
        subject.views,
        scratch_bytes(case),
        differentiate=subject.differentiated,
    )


def fused_gradient_bytes(case: Case) -> int:
    """Gradients of the fused losses while they are finished: accumulators, and what is rounded from them."""
    accumulators = gradient_bytes(case) // case.torch_dtype.itemsize * _FLOAT32
    return accumulators + (gradient_bytes(case) if case.torch_dtype.itemsize < _FLOAT32 else 0)


def streaming_traffic_bytes(case: Case, options: FusedOptions, plan: ColumnPlan) -> int:
    """Bytes that streaming moves at least besides what its products read.

    The logits' gradient is written once; each tile of its columns reads and writes the hidden states' gradient, and its
    own part of the weight's, through scratch where operands are rounded.
    """
    if not SUBJECTS[case.what].differentiated:
        return 0
    weight = fake_weight(case)
    item, operand = compute_dtype(weight).itemsize, operand_dtype(weight).itemsize
    sweeps = 2 if operand == item else 4
    tiles = math.ceil(case.local_vocab / plan.columns)
    accumulated = tiles * case.rows + (0 if case.frozen_weight else case.local_vocab)
    return case.rows * case.local_vocab * operand + sweeps * accumulated * case.hidden * item


def chunked_traffic_bytes(case: Case, options: FusedOptions, plan: ChunkPlan) -> int:
    """Bytes that row functions and the weight's gradient move at least, as docs/kernels.md counts them.

    Logits are written by the products and read for the statistics; then for the gradient, and before it once more
    where it depends on sums over the vocabulary. Recomputing begins with a pass that makes no gradient. Each group of
    chunks reads and writes the weight's gradient, through a tile where operands are rounded.
    """
    subject = SUBJECTS[case.what]
    weight = fake_weight(case)
    elements, item, operand = (
        case.rows * case.local_vocab,
        compute_dtype(weight).itemsize,
        operand_dtype(weight).itemsize,
    )
    logits = subject.views * elements * item
    if not subject.differentiated:
        return 2 * logits
    is_divergence = case.what == "divergence"
    passes = 4 if is_divergence and case.spec.gradient_needs_sums else 3
    if options.recompute:
        passes += 3 if is_divergence else 2
    total = passes * logits + elements * (item if plan.in_place else operand)
    if case.frozen_weight:
        return total
    groups = math.ceil(case.rows / plan.group_rows)
    sweeps = 2 if operand == item else 4
    return total + groups * sweeps * case.local_vocab * case.hidden * item


def input_bytes(case: Case) -> int:
    """Hidden states of all views, weight, labels and row weights."""
    states = (SUBJECTS[case.what].views * case.rows + case.local_vocab) * case.hidden * case.torch_dtype.itemsize
    return states + case.rows * (_FLOAT32 + (0 if case.what == "divergence" else _FLOAT64))


def logits_bytes(case: Case, rows: int) -> int:
    """Logits of so many rows and all views in the dtype that the fused losses give them."""
    item = compute_dtype(torch.empty(0, dtype=case.torch_dtype)).itemsize
    return SUBJECTS[case.what].views * rows * case.local_vocab * item


def _measured_tflops(case: Case) -> float:
    """Of one square product; on a CPU in float32, in which the fused losses multiply there."""
    side, dtype = (1024, torch.float32) if case.device == "cpu" else (8192, case.torch_dtype)
    matrix = torch.ones(side, side, dtype=dtype, device=case.device)
    out = torch.empty_like(matrix)
    return 2 * side**3 / _shortest_seconds(case, lambda: torch.mm(matrix, matrix, out=out)) / _TERA


def _measured_gbytes(case: Case) -> float:
    """Of copying 256 MiB, which no cache holds."""
    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8, device=case.device)
    target = torch.empty_like(source)
    return 2 * _COPIED_BYTES / _shortest_seconds(case, lambda: target.copy_(source)) / _GIGA


def _shortest_seconds(case: Case, run: Callable[[], object]) -> float:
    alone, threads = replace(case, tensor_parallel=1), torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        return min(milliseconds(alone, run) for _ in range(_REPEATS)) / 1e3
    finally:
        torch.set_num_threads(threads)
