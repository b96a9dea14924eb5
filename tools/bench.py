"""``copsd bench``: measure parts of the project on this machine against the plain way of doing the same."""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from copsd_kernels import reference
from megatron_copsd.loss.divergence import DivergenceSpec, fused_linear_divergence
from megatron_copsd.types import VocabShard

LOSS_EXAMPLES = """examples:
  copsd bench loss
  copsd bench loss --rows 2048 --hidden 2048 --vocab 151936 --dtype bfloat16 --repeats 3
  copsd bench loss --kind jsd --entry-clip 0.05 --frozen-weight --scratch-mb 32 --csv runs/bench/loss.csv
"""

_MIB = 1 << 20


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="copsd bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_loss_command(commands)
    args = parser.parse_args(argv)
    args.run(args)
    return 0


@dataclass(frozen=True)
class LossCase:
    """One shape and setting of the loss benchmark; names and meaning as on the command line."""

    rows: int
    hidden: int
    vocab: int
    dtype: str
    spec: DivergenceSpec
    frozen_weight: bool
    scratch_mb: float
    threads: int
    seed: int


@dataclass(frozen=True)
class LossResult:
    """What was measured of one implementation.

    Attributes:
        implementation: fused or dense.
        seconds: median wall time of forward and backward.
        peak_mib: growth of the process's peak resident memory above its inputs, gradients included.
        gradient_mib: size of the gradients themselves.
        hidden_error: relative norm error of the hidden states' gradient against the float64 oracle.
        weight_error: the same of the weight's gradient; None where it is frozen.
    """

    implementation: str
    seconds: float
    peak_mib: float
    gradient_mib: float
    hidden_error: float
    weight_error: float | None

    @property
    def extra_mib(self) -> float:
        """What the implementation needs besides inputs and gradients, which all have."""
        return self.peak_mib - self.gradient_mib


@dataclass(frozen=True)
class _Inputs:
    student_hidden: Tensor
    teacher_hidden: Tensor
    weight: Tensor
    row_weights: Tensor


def _add_loss_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "loss",
        help="fused linear divergence against dense eager autograd: time, memory, gradient error",
        description="Forward and backward of the fused linear divergence against dense eager autograd (matrix product, "
        "log_softmax, sum). Times are medians of interleaved repeats in one process; peak memory is that of a fresh "
        "process each, above its inputs; gradient errors are relative to the float64 oracle on the first rows.",
        epilog=LOSS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=1024, help="response rows R (default %(default)s)")
    parser.add_argument("--hidden", type=int, default=576, help="hidden size H (default %(default)s)")
    parser.add_argument("--vocab", type=int, default=49152, help="vocabulary V (default %(default)s)")
    parser.add_argument("--kind", choices=("forward_kl", "reverse_kl", "jsd"), default="forward_kl", help="divergence")
    parser.add_argument("--jsd-weight", type=float, default=0.5, help="teacher's weight in jsd (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits (default %(default)s)")
    parser.add_argument("--entry-clip", type=float, help="cap of each vocabulary entry (default none)")
    parser.add_argument("--token-clip", type=float, help="cap of each row (default none)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of hidden and weight")
    parser.add_argument("--frozen-weight", action="store_true", help="no gradient for the weight, as under LoRA")
    parser.add_argument("--scratch-mb", type=float, default=64.0, help="loss.scratch_mb (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats of each (default %(default)s)")
    parser.add_argument("--check-rows", type=int, default=16, help="rows of the gradient check (default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads (default: torch's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs (default %(default)s)")
    parser.add_argument("--csv", type=Path, help="append the numbers to this file")
    parser.set_defaults(run=_bench_loss)


def _bench_loss(args: argparse.Namespace) -> None:
    case = LossCase(
        rows=args.rows,
        hidden=args.hidden,
        vocab=args.vocab,
        dtype=args.dtype,
        spec=DivergenceSpec(args.kind, args.jsd_weight, args.temperature, args.entry_clip, args.token_clip),
        frozen_weight=args.frozen_weight,
        scratch_mb=args.scratch_mb,
        threads=args.threads,
        seed=args.seed,
    )
    memory = {name: _peak_memory(case, name) for name in _IMPLEMENTATIONS}
    seconds = _median_seconds(case, args.repeats)
    errors = _gradient_errors(case, min(args.check_rows, case.rows))
    gradients = [case.rows * case.hidden] + ([] if case.frozen_weight else [case.vocab * case.hidden])
    gradient_mib = sum(gradients) * getattr(torch, case.dtype).itemsize / _MIB
    results = [LossResult(name, seconds[name], memory[name], gradient_mib, *errors[name]) for name in _IMPLEMENTATIONS]
    _print_results(case, *results)
    if args.csv:
        _append_csv(args.csv, case, results)


def _fused(case: LossCase, inputs: _Inputs) -> Tensor:
    return fused_linear_divergence(
        inputs.student_hidden,
        inputs.teacher_hidden,
        inputs.weight,
        case.spec,
        inputs.row_weights,
        VocabShard(start=0, rows=case.vocab, vocab_size=case.vocab),
        scratch_bytes=int(case.scratch_mb * _MIB),
    ).loss


def _dense(case: LossCase, inputs: _Inputs) -> Tensor:
    dtype = torch.promote_types(inputs.weight.dtype, torch.float32)
    with torch.no_grad():
        teacher_logits = (inputs.teacher_hidden @ inputs.weight.t()).to(dtype)
    return (inputs.row_weights * _divergence(case, inputs.student_hidden @ inputs.weight.t(), teacher_logits)).sum()


def _divergence(case: LossCase, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    spec = case.spec
    return reference.divergence(
        student_logits.to(teacher_logits.dtype),
        teacher_logits,
        spec.kind,
        jsd_weight=spec.jsd_weight,
        temperature=spec.temperature,
        entry_clip=spec.entry_clip,
        token_clip=spec.token_clip,
    )


_IMPLEMENTATIONS: dict[str, Callable[[LossCase, _Inputs], Tensor]] = {"fused": _fused, "dense": _dense}


def _make_inputs(case: LossCase) -> _Inputs:
    """Logits of standard deviation 3, and a teacher close enough to the student to be worth distilling from."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).mul_(scale)

    student = normal(case.rows, case.hidden)
    teacher = normal(case.rows, case.hidden, scale=0.2).add_(student)
    weight = normal(case.vocab, case.hidden, scale=3 * case.hidden**-0.5).requires_grad_(not case.frozen_weight)
    return _Inputs(student.requires_grad_(), teacher, weight, torch.full((case.rows,), 1 / case.rows))


def _gradients(case: LossCase, inputs: _Inputs, name: str) -> tuple[Tensor, ...]:
    leaves = [inputs.student_hidden] + ([] if case.frozen_weight else [inputs.weight])
    return torch.autograd.grad(_IMPLEMENTATIONS[name](case, inputs), leaves)


def _peak_memory(case: LossCase, name: str) -> float:
    """MiB by which one forward and backward pass raises the peak resident memory of a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_peak_memory, args=(case, name, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        raise RuntimeError(f"the {name} process ended without a result (out of memory?)") from error
    finally:
        process.join()


def _send_peak_memory(case: LossCase, name: str, sender: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(case.threads)
    inputs = _make_inputs(case)
    # A tiny pass first, so that what the libraries load on first use is not counted.
    small = LossCase(8, 64, 512, case.dtype, case.spec, case.frozen_weight, 1.0, case.threads, case.seed)
    _gradients(small, _make_inputs(small), name)
    before = _peak_resident_mib()
    _gradients(case, inputs, name)
    sender.send(_peak_resident_mib() - before)


def _peak_resident_mib() -> float:
    """Peak resident memory of this process since it began.

    Not getrusage's ru_maxrss, which a process started by a larger one inherits from it.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE).group(1)) / 1024


def _median_seconds(case: LossCase, repeats: int) -> dict[str, float]:
    torch.set_num_threads(case.threads)
    inputs = _make_inputs(case)
    times: dict[str, list[float]] = {name: [] for name in _IMPLEMENTATIONS}
    for repeat in range(repeats + 1):
        for name, taken in times.items():
            start = time.perf_counter()
            _gradients(case, inputs, name)
            if repeat > 0:  # the first of each warms up
                taken.append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _gradient_errors(case: LossCase, rows: int) -> dict[str, tuple[float, float | None]]:
    """Relative norm errors of (hidden, weight) gradients on the first rows, against the float64 oracle."""
    full = _make_inputs(case)
    first = [getattr(full, name).detach()[:rows] for name in ("student_hidden", "teacher_hidden")]
    inputs = _Inputs(first[0].clone().requires_grad_(), first[1], full.weight, full.row_weights[:rows])
    exact_hidden = inputs.student_hidden.detach().double().requires_grad_()
    exact_weight = inputs.weight.detach().double().requires_grad_(not case.frozen_weight)
    teacher_logits = inputs.teacher_hidden.double() @ exact_weight.detach().t()
    divergence = _divergence(case, exact_hidden @ exact_weight.t(), teacher_logits)
    leaves = [exact_hidden] + ([] if case.frozen_weight else [exact_weight])
    exact = torch.autograd.grad((inputs.row_weights * divergence).sum(), leaves)
    errors = {}
    for name in _IMPLEMENTATIONS:
        found = _gradients(case, inputs, name)
        relative = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
        errors[name] = (relative[0], None if case.frozen_weight else relative[1])
    return errors


def _print_results(case: LossCase, fused: LossResult, dense: LossResult) -> None:
    spec = case.spec
    shape = f"R={case.rows} H={case.hidden} V={case.vocab} {case.dtype}, scratch {case.scratch_mb:g} MiB"
    setting = f"{spec.kind}, entry_clip {spec.entry_clip}, token_clip {spec.token_clip}, {case.threads} threads"
    table = Table("", "fused", "dense", "fused / dense", title=f"{shape}\n{setting}")
    rows = (
        ("seconds, forward and backward", ".3f", fused.seconds, dense.seconds),
        ("peak MiB above inputs", ".0f", fused.peak_mib, dense.peak_mib),
        ("  the same without the gradients", ".0f", fused.extra_mib, dense.extra_mib),
        ("relative error of dH", ".1e", fused.hidden_error, dense.hidden_error),
        ("relative error of dW", ".1e", fused.weight_error, dense.weight_error),
    )
    for name, form, ours, plain in rows:
        if ours is None or plain is None:
            table.add_row(name, "frozen", "frozen", "")
        else:
            ratio = f"{ours / plain:.3f}" if plain > 0 else "too small to measure"
            table.add_row(name, format(ours, form), format(plain, form), ratio)
    Console().print(table)


def _append_csv(path: Path, case: LossCase, results: list[LossResult]) -> None:
    """One line for each implementation: the case, then what was measured; a heading where the file is new."""
    setting = {field.name: getattr(case, field.name) for field in fields(case) if field.name != "spec"}
    setting |= {field.name: getattr(case.spec, field.name) for field in fields(case.spec)}
    lines = [setting | {field.name: getattr(result, field.name) for field in fields(result)} for result in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        if new:
            writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
