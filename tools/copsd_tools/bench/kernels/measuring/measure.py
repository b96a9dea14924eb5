"""Time, memory and gradient error of all implementations of one case, and the time of its matrix products alone.

Times are those of interleaved repeats in one process, so that whatever else the machine does meets all alike. Peak
memory is that of a fresh process each on a CPU, and the allocator's on CUDA, above the inputs. Each case has its own
processes: what one leaves behind (compiled code, a broken CUDA context) does not reach the next.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from copsd_tools.bench.kernels.cases import Case
from copsd_tools.bench.kernels.catalogue import FLOOR
from copsd_tools.bench.kernels.measuring.processes import Failure, run_ranks
from copsd_tools.bench.kernels.measuring.worker import Plan, Probe, Timed, probe_alone, time_all
from copsd_tools.bench.kernels.subjects.registry import SUBJECTS

_MIB = 1 << 20


@dataclass(frozen=True)
class Measurement:
    """What was measured of one implementation on one case; None where it was not.

    Attributes:
        implementation: its name.
        chunk: rows it took at a time, where that is a setting of it.
        median_ms: wall time of forward and backward; of forward alone where nothing is differentiated.
        min_ms: the shortest.
        iqr_ms: interquartile spread.
        floor_ratio: median over that of the matrix products alone, measured in the same interleaved run.
        dense_ratio: median over that of dense eager autograd, likewise.
        peak_mib: peak memory above the inputs.
        extra_mib: the same without the gradients, which all return where they are asked for.
        hidden_error: relative norm error of the hidden states' gradient against the float64 oracle.
        weight_error: the same of the weight's gradient; None where it is frozen.
        log_prob_error: the same of the labels' log-probabilities; None where there are gradients instead.
        entropy_error: the same of the entropies.
        teacher_kl: mean KL(teacher||student) of the checked rows, in nats: what the errors of a
            divergence's gradients depend on.
        note: why there is no measurement, or what to know of it.
    """

    implementation: str
    chunk: int | None = None
    median_ms: float | None = None
    min_ms: float | None = None
    iqr_ms: float | None = None
    floor_ratio: float | None = None
    dense_ratio: float | None = None
    peak_mib: float | None = None
    extra_mib: float | None = None
    hidden_error: float | None = None
    weight_error: float | None = None
    log_prob_error: float | None = None
    entropy_error: float | None = None
    teacher_kl: float | None = None
    note: str = ""


def measure(case: Case, names: Sequence[str], plan: Plan) -> list[Measurement]:
    """Measure implementations, and the floor if named, of one case; those that cannot run say why in their note."""
    implementations = SUBJECTS[case.what].implementations
    notes: dict[str, str] = {}
    probes: dict[str, list[Probe]] = {}
    for name in names:
        refusal = _missing_devices(case) or (None if name == FLOOR else implementations[name].refuses(case))
        if refusal is not None:
            notes[name] = refusal
        elif case.device == "cpu" and name != FLOOR:
            # In a process of its own, which may run out of memory without taking the others along.
            found = run_ranks(probe_alone, case, name)
            if isinstance(found, Failure):
                notes[name] = found.reason
            else:
                probes[name] = found
    runnable = [name for name in names if name not in notes]
    timed: dict[str, list[Timed]] = {}
    if runnable:
        ranks = run_ranks(time_all, case, runnable, plan, probes)
        for name in runnable:
            found = ranks if isinstance(ranks, Failure) else _failure_or_all([rank[name] for rank in ranks])
            if isinstance(found, Failure):
                notes[name] = found.reason
            else:
                timed[name] = found
    medians = {name: statistics.median(_slowest(timed[name])) for name in (FLOOR, "dense") if name in timed}
    return [
        _summary(case, name, timed[name], medians) if name in timed else Measurement(name, note=notes[name])
        for name in names
    ]


def _missing_devices(case: Case) -> str | None:
    found = torch.cuda.device_count()
    if case.device == "cuda" and case.tensor_parallel > found:
        return f"needs {case.tensor_parallel} CUDA devices, this machine has {found}"
    return None


def _failure_or_all(ranks: list[Timed | Failure]) -> list[Timed] | Failure:
    return next((found for found in ranks if isinstance(found, Failure)), ranks)


def _slowest(ranks: list[Timed]) -> list[float]:
    """For each repeat the time of its slowest rank."""
    return [max(times) for times in zip(*(rank.milliseconds for rank in ranks), strict=True)]


def _summary(case: Case, name: str, ranks: list[Timed], medians: dict[str, float]) -> Measurement:
    """One line of the results: the slowest rank's times, the largest memory and errors of any rank."""
    times = _slowest(ranks)
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else (median,) * 3
    measurement = Measurement(
        implementation=name,
        median_ms=median,
        min_ms=min(times),
        iqr_ms=high - low,
        floor_ratio=median / medians[FLOOR] if FLOOR in medians else None,
        dense_ratio=median / medians["dense"] if "dense" in medians else None,
        teacher_kl=ranks[0].teacher_kl,
        note=ranks[0].note,
    )
    if name == FLOOR:
        return measurement
    peak_mib = max(rank.probe.peak_mib for rank in ranks)
    return replace(
        measurement,
        chunk=ranks[0].probe.chunk,
        peak_mib=peak_mib,
        extra_mib=peak_mib - gradient_bytes(case) / _MIB,
        **{f"{output}_error": max(rank.errors[output] for rank in ranks) for output in ranks[0].errors},
    )


def gradient_bytes(case: Case) -> int:
    """Bytes of the gradients that every implementation returns."""
    if not SUBJECTS[case.what].differentiated:
        return 0
    rows = case.rows + (0 if case.frozen_weight else case.local_vocab)
    return rows * case.hidden * case.torch_dtype.itemsize
