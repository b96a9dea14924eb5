"""Fresh processes to measure in: one for each tensor-parallel rank, whose end, however it ends, is a result."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist

from copsd_tools.bench.kernels.cases import Case

_LONGEST_REASON = 240  # characters; compilers print pages
_KILLED = -9
_SECONDS_TO_END = 60.0  # for a process that has sent its result


@dataclass(frozen=True)
class Failure:
    """Why nothing was measured."""

    reason: str


def run_ranks(function: Callable[..., object], case: Case, *arguments: object) -> list[object] | Failure:
    """Call ``function(case, rank, *arguments)`` in ``case.tensor_parallel`` new processes, joined in a process group.

    Returns:
        What each rank returned, in rank order; a failure if any rank failed, which ends the others.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{Path(folder) / 'rendezvous'}"
        receivers, processes = {}, []
        for rank in range(case.tensor_parallel):
            receiver, sender = context.Pipe(duplex=False)
            receivers[receiver] = rank
            process = context.Process(target=_run, args=(function, case, rank, rendezvous, arguments, sender))
            process.start()
            processes.append(process)
            sender.close()
        patience = 0.0
        try:
            found = _collect(receivers, processes)
            if not isinstance(found, Failure):
                patience = _SECONDS_TO_END
            return found
        finally:
            for process in processes:
                process.join(patience)
                process.terminate()  # a rank that waits for one that failed would wait long
                process.join()


def failure(error: Exception) -> Failure:
    """What to report of an exception: its type and the first line that it says something in."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return Failure(f"{type(error).__name__}: {line}"[:_LONGEST_REASON])


def _collect(
    receivers: dict[Connection, int], processes: list[multiprocessing.process.BaseProcess]
) -> list[object] | Failure:
    results: dict[int, object] = {}
    while len(results) < len(processes):
        for receiver in wait([receiver for receiver, rank in receivers.items() if rank not in results]):
            rank = receivers[receiver]
            try:
                result = receiver.recv()
            except EOFError:
                processes[rank].join()
                code = processes[rank].exitcode
                killed = "; killed, out of memory?" if code == _KILLED else ""
                return Failure(f"the process ended with exit code {code} and without a result{killed}")
            if isinstance(result, Failure):
                return result
            results[rank] = result
    return [results[rank] for rank in sorted(results)]


def _run(
    function: Callable[..., object],
    case: Case,
    rank: int,
    rendezvous: str,
    arguments: tuple[object, ...],
    sender: Connection,
) -> None:
    torch.set_num_threads(case.threads)
    try:
        if case.device == "cuda":
            torch.cuda.set_device(rank)
        if case.tensor_parallel > 1:
            backend = "nccl" if case.device == "cuda" else "gloo"
            dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=case.tensor_parallel)
        result = function(case, rank, *arguments)
    except Exception as error:  # whatever a compared implementation raises is its result
        result = failure(error)
    sender.send(result)
    if dist.is_initialized() and not isinstance(result, Failure):
        dist.barrier()  # leaving early would break the connections of the slower ranks
        dist.destroy_process_group()
