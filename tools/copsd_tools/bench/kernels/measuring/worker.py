"""What runs in the processes of one case: memory of an implementation alone, times of all in turns, gradient errors."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from copsd_kernels import reference
from copsd_tools.bench.kernels.cases import Case, Inputs, first_rows, make_inputs, make_weight
from copsd_tools.bench.kernels.catalogue import FLOOR
from copsd_tools.bench.kernels.measuring.floor import GemmFloor
from copsd_tools.bench.kernels.measuring.processes import Failure, failure
from copsd_tools.bench.kernels.subjects.registry import SUBJECTS
from megatron_copsd.types import VocabShard

_MIB = 1 << 20
_L2_FLUSH_BYTES = 256 << 20  # several times the second-level cache of any GPU

Result = TypeVar("Result")


@dataclass(frozen=True)
class Plan:
    """How to measure: untimed and timed calls of each implementation, and the rows whose outputs are checked."""

    warmup: int
    repeats: int
    check_rows: int


@dataclass(frozen=True)
class Probe:
    """One implementation on its own.

    Attributes:
        chunk: the fastest of its chunks.
        peak_mib: peak memory of one pass above its inputs.
    """

    chunk: int | None
    peak_mib: float


@dataclass(frozen=True)
class Timed:
    """One rank's findings of one implementation.

    Attributes:
        milliseconds: of each repeat.
        teacher_kl: mean KL(teacher||student) of the checked rows, in nats; None of what is no divergence.
        probe: None of the floor.
        errors: relative norm errors by ``Subject.outputs``; None of the floor.
        note: what to know of it.
    """

    milliseconds: list[float]
    teacher_kl: float | None
    probe: Probe | None = None
    errors: dict[str, float] | None = None
    note: str = ""


def probe_alone(case: Case, rank: int, name: str) -> Probe:
    """Probe one implementation in this process, which was made for it."""
    inputs = make_inputs(case, rank)
    if not _runs_before_probe(case, name):
        # What the libraries load on first use is not counted; the default budget always holds a row this small.
        small = replace(case, rows=8, hidden=64, vocab=512, scratch_mb=None)
        _outputs(small, make_inputs(small, rank), name, SUBJECTS[case.what].implementations[name].chunks[0])
    return _probe(case, inputs, name)


def time_all(
    case: Case, rank: int, names: Sequence[str], plan: Plan, probes: dict[str, list[Probe]]
) -> dict[str, Timed | Failure]:
    """Time all implementations in turns and check their outputs; a failure stays with the one that failed.

    Args:
        case: what to measure.
        rank: of this process among those that share the vocabulary.
        names: implementations and, possibly, the floor.
        plan: how often.
        probes: of each implementation and rank; those that are missing are made here.

    Collectives: a barrier before each call where the vocabulary is shared.
    """
    inputs = make_inputs(case, rank)
    probed: dict[str, Probe] = {}
    failed: dict[str, Failure] = {}
    for name in names:
        if name != FLOOR:
            _compile_for_each_shape(case, name)
            found = probes[name][rank] if name in probes else _attempt(case, partial(_probe, case, inputs, name))
            (failed if isinstance(found, Failure) else probed)[name] = found

    runs = {name: partial(_outputs, case, inputs, name, probe.chunk) for name, probe in probed.items()}
    floor = GemmFloor(case, inputs) if FLOOR in names else None
    note = floor.note if floor else ""
    times, failed_runs = _take_turns(case, runs | ({FLOOR: floor.run} if floor else {}), plan)
    failed |= failed_runs
    del floor  # its buffers are large

    teacher_kl, exact, checked = _oracle(case, rank, inputs, min(plan.check_rows, case.rows))
    results: dict[str, Timed | Failure] = dict(failed)
    for name, taken in times.items():
        if name == FLOOR:
            results[name] = Timed(taken, teacher_kl, note=note)
            continue
        errors = _attempt(case, lambda: _errors(case, _outputs(case, checked, name, probed[name].chunk), exact))  # noqa: B023
        results[name] = errors if isinstance(errors, Failure) else Timed(taken, teacher_kl, probed[name], errors)
    return results


def _take_turns(
    case: Case, runs: dict[str, Callable[[], object]], plan: Plan
) -> tuple[dict[str, list[float]], dict[str, Failure]]:
    """Milliseconds of each timed repeat by name, of those that did not fail, and the failures."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    failed: dict[str, Failure] = {}
    for _ in range(plan.warmup + plan.repeats):
        for name in list(times):
            found = _attempt(case, partial(milliseconds, case, runs[name]))
            if isinstance(found, Failure):
                failed[name] = found
                del times[name]
            else:
                times[name].append(found)
    return {name: taken[plan.warmup :] for name, taken in times.items()}, failed


def _attempt(case: Case, run: Callable[[], Result]) -> Result | Failure:
    try:
        return run()
    except Exception as error:  # whatever a compared implementation raises is its result
        if case.tensor_parallel > 1:
            raise  # the other ranks may be waiting for this one; their process group ends
        found = failure(error)
    if case.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return found


def _outputs(case: Case, inputs: Inputs, name: str, chunk: int | None) -> tuple[Tensor, ...]:
    return finish(case, inputs, lambda: SUBJECTS[case.what].implementations[name].run(case, inputs, chunk))


def finish(case: Case, inputs: Inputs, run: Callable[[], Tensor | tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Gradients of the loss that ``run`` returns, or the row values that it returns without autograd."""
    if SUBJECTS[case.what].differentiated:
        return torch.autograd.grad(run(), inputs.leaves)
    with torch.no_grad():
        return run()


def _probe(case: Case, inputs: Inputs, name: str) -> Probe:
    """Choose the fastest chunk, and measure memory by one call that neither compiles nor loads anything."""
    _compile_for_each_shape(case, name)
    chunks = SUBJECTS[case.what].implementations[name].chunks
    if len(chunks) > 1:
        # Chunks beyond the rows are all the same.
        chunks = tuple(chunk for chunk in chunks if chunk < 2 * case.rows) or chunks[:1]
    taken = dict.fromkeys(chunks, 0.0)
    if _runs_before_probe(case, name) or case.device == "cuda":
        for chunk in chunks:
            run = partial(_outputs, case, inputs, name, chunk)
            run()
            taken[chunk] = milliseconds(case, run)
    fastest = min(taken, key=taken.__getitem__)
    run = partial(_outputs, case, inputs, name, fastest)
    if case.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return Probe(fastest, (torch.cuda.max_memory_allocated() - before) / _MIB)
    if _runs_before_probe(case, name):
        _reset_peak_resident()
    before = _peak_resident_mib()
    run()
    return Probe(fastest, _peak_resident_mib() - before)


def _runs_before_probe(case: Case, name: str) -> bool:
    """Whether it has to be called at full size before its memory can be measured."""
    implementation = SUBJECTS[case.what].implementations[name]
    return implementation.compiles or len(implementation.chunks) > 1


def _compile_for_each_shape(case: Case, name: str) -> None:
    """No dynamic shapes, which are slower, and no falling back to eager code after a few shapes, which is silent."""
    if SUBJECTS[case.what].implementations[name].compiles:
        import torch._dynamo

        torch._dynamo.config.automatic_dynamic_shapes = False
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True


def milliseconds(case: Case, run: Callable[[], object]) -> float:
    """Wall time of one call; on CUDA between events, with the second-level cache flushed before."""
    if case.tensor_parallel > 1:
        dist.barrier()
    if case.device == "cpu":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.zeros(_L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _peak_resident_mib() -> float:
    """Peak resident memory of this process since it began, or since it was reset.

    Not getrusage's ru_maxrss, which a process started by a larger one inherits from it.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE).group(1)) / 1024


def _reset_peak_resident() -> None:
    """Give freed memory back to the system, and begin the peak anew from what is left (proc(5), clear_refs)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _oracle(case: Case, rank: int, inputs: Inputs, rows: int) -> tuple[float | None, tuple[Tensor, ...], Inputs]:
    """Mean KL of the first rows, their exact outputs (of this rank's shard), and the inputs cut to them."""
    checked = first_rows(inputs, rows)
    shards = [
        checked.weight.detach() if other == rank else make_weight(case, other) for other in range(case.tensor_parallel)
    ]
    whole = replace(
        checked,
        student_hidden=checked.student_hidden.detach().double().requires_grad_(),
        teacher_hidden=checked.teacher_hidden.double(),
        weight=torch.cat(shards)[: case.vocab].double().requires_grad_(not case.frozen_weight),
        shard=VocabShard(0, case.vocab, case.vocab),
    )
    exact = finish(case, whole, lambda: SUBJECTS[case.what].exact(case, whole))
    if SUBJECTS[case.what].differentiated:
        shard = checked.shard
        exact = (exact[0], *(gradient[shard.start : shard.start + shard.valid] for gradient in exact[1:]))
    if case.what != "divergence":
        return None, exact, checked
    with torch.no_grad():
        logits = (hidden @ whole.weight.t() for hidden in (whole.student_hidden, whole.teacher_hidden))
        return float(reference.divergence(*logits, "forward_kl").mean()), exact, checked


def _errors(case: Case, found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, float]:
    errors = (float((a[: len(b)].double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
    return dict(zip(SUBJECTS[case.what].outputs, errors, strict=False))  # a frozen weight has no gradient
