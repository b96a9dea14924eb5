"""The best layout of a model on growing numbers of GPUs, as a Markdown table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_copsd.plan.hardware import GPUS_PER_NODE, Assumptions, Gpu
from megatron_copsd.plan.search import SearchSpace, search
from megatron_copsd.plan.sizes import ModelSizes
from megatron_copsd.plan.workload import Workload

_GIB = 1 << 30
_COLUMNS = (
    "GPUs", "sequences", "layout", "microbatch", "recompute", "peak GiB",
    "rollout s", "teacher s", "student s", "update s", "bubble", "MFU",
)  # fmt: skip


def scaling_table(sizes: ModelSizes, counts: Sequence[int], work: Workload, gpu: Gpu, assumed: Assumptions) -> str:
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
        result = search(sizes, gpus, scaled, gpu, assumed, SearchSpace())
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
