"""Every layout of a model on so many GPUs: which fit, which are fastest, and the best as the number of GPUs grows."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_copsd.architecture import Architecture
from megatron_copsd.plan.hardware import GPUS_PER_NODE, Assumptions, Gpu
from megatron_copsd.plan.memory import MemoryPlan, memory_plan
from megatron_copsd.plan.steptime import StepTime, step_time
from megatron_copsd.plan.workload import PlanLayout, Recompute, Workload, layout_problems

_POWERS = (1, 2, 4, 8, 16, 32, 64)
_GIB = 1 << 30
_COLUMNS = (
    "GPUs", "sequences", "layout", "microbatch", "recompute", "peak GiB",
    "rollout s", "teacher s", "student s", "update s", "bubble", "MFU",
)  # fmt: skip


@dataclass(frozen=True)
class SearchSpace:
    """Values of each axis that are tried.

    Attributes:
        tensor, sequence, pipeline, virtual, context, expert, recompute, micro_batch: see ``PlanLayout``.
        uneven: whether first and last stage may have fewer layers where the stages do not divide them.
    """

    tensor: tuple[int, ...] = (1, 2, 4, 8)
    sequence: tuple[bool, ...] = (False, True)
    pipeline: tuple[int, ...] = tuple(range(1, 33))
    virtual: tuple[int, ...] = (1, 2, 4)
    context: tuple[int, ...] = (1, 2, 4, 8)
    expert: tuple[int, ...] = _POWERS
    recompute: tuple[Recompute, ...] = ("none", "selective", "full")
    micro_batch: tuple[int, ...] = (1, 2, 4, 8, 16)
    uneven: bool = True


@dataclass(frozen=True)
class Ranked:
    """One layout that fits, with its predictions."""

    layout: PlanLayout
    memory: MemoryPlan
    time: StepTime


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        ranked: layouts that fit, fastest first.
        rejected: how many layouts were out, by reason.
        smallest: the layout that comes closest to fitting, where none fits.
    """

    ranked: tuple[Ranked, ...]
    rejected: dict[str, int]
    smallest: tuple[PlanLayout, MemoryPlan] | None


def search(
    model: Architecture, gpus: int, work: Workload, gpu: Gpu, assumed: Assumptions, space: SearchSpace
) -> SearchResult:
    """Try every layout of the space."""
    ranked: list[Ranked] = []
    rejected: Counter[str] = Counter()
    smallest: tuple[PlanLayout, MemoryPlan] | None = None
    for layout in layouts(model, gpus, work, space):
        memory = memory_plan(model, layout, work, gpu, assumed)
        if memory.fits:
            ranked.append(Ranked(layout, memory, step_time(model, layout, work, gpu, assumed)))
            continue
        rejected[f"does not fit: {largest_part(memory)} above all"] += 1
        if smallest is None or memory.peak < smallest[1].peak:
            smallest = layout, memory
    # Equal times: more room first, then the simpler layout.
    ranked.sort(key=lambda r: (round(r.time.total, 3), -r.memory.margin))
    return SearchResult(tuple(ranked), dict(rejected), None if ranked else smallest)


def layouts(model: Architecture, gpus: int, work: Workload, space: SearchSpace) -> Iterator[PlanLayout]:
    """Yield the layouts that can be started and leave no replica without work."""
    axes = itertools.product(space.tensor, space.sequence, space.pipeline, space.virtual, space.context, space.expert)
    for tensor, sequence, pipeline, virtual, context, expert in axes:
        if gpus % (tensor * pipeline * context):
            continue
        ends = _uneven_ends(model.layers, pipeline) if space.uneven else (None, None)
        frame = PlanLayout(gpus, tensor, sequence, pipeline, virtual, *ends, context, expert)
        if frame.data > work.sequences or layout_problems(model, frame):
            continue
        for recompute, micro_batch in itertools.product(space.recompute, space.micro_batch):
            # The interleaved schedule takes microbatches in rounds of as many as there are stages.
            in_rounds = virtual == 1 or work.microbatches(frame.data, micro_batch) % pipeline == 0
            if in_rounds and (micro_batch == 1 or micro_batch <= -(-work.sequences // frame.data)):
                yield dataclasses.replace(frame, recompute=recompute, micro_batch=micro_batch)


def _uneven_ends(layers: int, pipeline: int) -> tuple[int | None, int | None]:
    """Layers of first and last stage where they can't be as the rest; the last, which has the loss, gets fewer."""
    if layers % pipeline == 0 or pipeline < 3:
        return None, None
    ends = layers - -(-layers // pipeline) * (pipeline - 2)
    return (-(-ends // 2), ends // 2) if ends >= 2 else (None, None)


def largest_part(memory: MemoryPlan) -> str:
    """Name the part that takes most in the fullest phase."""
    phase = memory.fullest_phase
    parts = [part for part in memory.parts if phase in part.phases]
    return max(parts, key=lambda part: part.bytes).name


def scaling_table(model: Architecture, counts: Sequence[int], work: Workload, gpu: Gpu, assumed: Assumptions) -> str:
    """Search every layout for each number of GPUs.

    A step has one sequence for each GPU, and never fewer than the configuration asks for. Rollouts come from servers of
    one node each, on half as many further GPUs.
    """
    lines = [_row(_COLUMNS), _row(["---"] * len(_COLUMNS))]
    for gpus in counts:
        scaled = dataclasses.replace(
            work,
            sequences=max(work.sequences, gpus),
            engine="sglang",
            engine_tensor=GPUS_PER_NODE,
            engines=max(1, gpus // (2 * GPUS_PER_NODE)),
            shares_gpus=False,
        )
        result = search(model, gpus, scaled, gpu, assumed, SearchSpace())
        if not result.ranked:
            need = f"closest needs {result.smallest[1].peak / _GIB:.0f} GiB" if result.smallest else "not to be cut so"
            lines.append(_row([str(gpus), str(scaled.sequences), f"none fits ({need})", *[""] * 9]))
            continue
        best = result.ranked[0]
        seconds = (f"{best.time.seconds[phase]:.2f}" for phase in ("rollout", "teacher", "student", "update"))
        shares = f"{best.time.bubble:.0%}", f"{best.time.mfu:.1%}"
        batch = str(best.layout.micro_batch), best.layout.recompute, f"{best.memory.peak / _GIB:.1f}"
        lines.append(_row([str(gpus), str(scaled.sequences), best.layout.cuts(), *batch, *seconds, *shares]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
