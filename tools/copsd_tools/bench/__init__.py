"""``copsd bench``: measure the loss, packing and servers against the other ways of doing the same."""

from __future__ import annotations

import argparse
import tempfile
from itertools import product
from pathlib import Path

import torch
from rich.console import Console

from copsd_tools.bench.cases import KINDS, PRESETS, Case, Preset, Sweep
from copsd_tools.bench.explain import DEVICES, cost_table, find_device
from copsd_tools.bench.kernels import bench_kernels
from copsd_tools.bench.measure import measure
from copsd_tools.bench.report import comparison, slug
from copsd_tools.bench.results import Result, append, device_name, here
from copsd_tools.bench.rollout import Load, bench_rollout, rollout_table
from copsd_tools.bench.servers import append_lines, load_for_servers
from copsd_tools.bench.subjects import SUBJECTS
from copsd_tools.bench.sync import TRANSPORTS, bench_sync, sync_table
from copsd_tools.bench.worker import Plan
from megatron_copsd.config.check import check
from megatron_copsd.config.load import load_config
from megatron_copsd.errors import UserError, describe
from megatron_copsd.loss.divergence import DivergenceSpec

LOSS_EXAMPLES = """examples:
  copsd bench loss
  copsd bench loss --rows 2048 --hidden 2048 --vocab 151936 --dtype bfloat16 --repeats 3
  copsd bench loss --kind jsd --entry-clip 0.05 --frozen-weight --scratch-mb 32 --csv runs/bench/loss.csv
"""
KERNELS_EXAMPLES = """examples:
  copsd bench kernels                                    the preset of this machine's device
  copsd bench kernels --preset memory --out runs/bench/memory
  copsd bench kernels --shapes 1024,576,49152 --kinds jsd --entry-clips none 0.05 --implementations fused dense
  copsd bench kernels --what cross_entropy --shapes 1024,576,49152 --threads 1
  copsd bench kernels --explain --shapes 1024,576,49152  products, traffic and bytes on this machine; nothing is run
  copsd bench kernels --explain H200 --shapes 8192,4096,151936 --kinds forward_kl jsd --frozen-weight
  copsd bench kernels --explain H200 --what log_probs --tflops 800
  copsd bench kernels --shapes 1024,4096,151936 --rows 1024 4096 16384 --dtype bfloat16 --tensor-parallel 1 2

"""
COMPILE_EXAMPLES = """examples:
  copsd bench compile
  copsd bench compile --capabilities 90 --only "streaming statistics"
"""
ROLLOUT_EXAMPLES = """examples:
  copsd bench rollout configs/smollm2_mgsm_sw.yaml
  copsd bench rollout CONFIG model.dtype=bfloat16 --concurrency 1 8 --response-tokens 128 --csv runs/bench/rollout.csv
  copsd bench rollout CONFIG 'sglang.urls=[http://127.0.0.1:30000]'     a server that runs already (copsd serve)
"""
SYNC_EXAMPLES = """examples:
  copsd bench sync configs/smollm2_mgsm_sw.yaml
  copsd bench sync CONFIG model.dtype=bfloat16 --transports distributed tensor --repeats 5 --csv runs/bench/sync.csv
  copsd bench sync CONFIG rollout.bucket_mb=64 sglang.folder=/dev/shm/weights --transports disk
"""
PACKING_EXAMPLES = """examples:
  copsd bench packing configs/smollm2_mgsm_sw.yaml
  copsd bench packing CONFIG rollout.prompts_per_step=64 optimizer.micro_batch_tokens=16384 --csv runs/bench/packing.csv
"""
_FAILED = 1
_HERE = "here"


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="copsd bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_loss_command(commands)
    _add_kernels_command(commands)
    _add_compile_command(commands)
    _add_rollout_command(commands)
    _add_sync_command(commands)
    _add_packing_command(commands)
    args = parser.parse_args(argv)
    return args.run(args, argv)


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
    parser.add_argument("--rows", type=_positive, default=1024, help="response rows R (default %(default)s)")
    parser.add_argument("--hidden", type=_positive, default=576, help="hidden size H (default %(default)s)")
    parser.add_argument("--vocab", type=_positive, default=49152, help="vocabulary V (default %(default)s)")
    parser.add_argument("--kind", choices=KINDS, default="forward_kl", help="divergence")
    parser.add_argument("--entry-clip", type=float, help="cap of each vocabulary entry (default none)")
    parser.add_argument("--token-clip", type=float, help="cap of each row (default none)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of hidden and weight")
    parser.add_argument("--scratch-mb", type=float, help="loss.scratch_mb (default: the loss's own)")
    parser.add_argument("--repeats", type=_positive, default=5, help="timed repeats of each (default %(default)s)")
    parser.add_argument(
        "--check-rows", type=_positive, default=16, help="rows whose gradients are checked (%(default)s)"
    )
    parser.add_argument("--csv", type=Path, help="append the numbers to this file")
    _add_common_options(parser)
    parser.set_defaults(run=_bench_loss)


def _add_kernels_command(commands: argparse._SubParsersAction) -> None:
    listed = "\n\n".join(
        f"implementations of {what}: {subject.description}\n"
        + "\n".join(f"  {name:<22} {entry.description}" for name, entry in subject.implementations.items())
        for what, subject in SUBJECTS.items()
    )
    names = dict.fromkeys(name for subject in SUBJECTS.values() for name in subject.implementations)
    parser = commands.add_parser(
        "kernels",
        help="every implementation side by side, over shapes and settings: CSV, Markdown and plots in a folder",
        description="A fused loss, its peers, and the matrix products alone (the floor), over shapes and settings. "
        "A folder receives results.csv (a line as soon as it is measured), results.md and plots. Running again adds "
        "what is missing; what could not run has a line that says why. --explain measures nothing: it prints what "
        "arithmetic and the code say of the same cases.",
        epilog=KERNELS_EXAMPLES + listed,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--what", choices=SUBJECTS, default="divergence", help="to compute (default %(default)s)")
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/NAME-OF-THE-DEVICE)")
    parser.add_argument("--preset", choices=PRESETS, help="named set of cases (default: cpu or gpu, by the device)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default %(default)s")
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="R,H,V", help="instead of the preset's")
    parser.add_argument("--rows", nargs="+", type=_positive, metavar="R", help="instead of the R of each shape")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="divergences, instead of the preset's")
    parser.add_argument("--entry-clips", nargs="+", type=_clip, metavar="NATS", help='caps, or "none", likewise')
    parser.add_argument("--implementations", nargs="+", choices=names, metavar="NAME", help="likewise")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of hidden and weight, likewise")
    parser.add_argument("--tensor-parallel", nargs="+", type=_positive, default=[1], metavar="N", help="ranks (1)")
    parser.add_argument("--scratch-mb", type=float, help="loss.scratch_mb of the fused loss (default: the loss's own)")
    parser.add_argument("--repeats", type=_positive, help="timed repeats of each, instead of the preset's")
    parser.add_argument("--warmup", type=int, help="untimed repeats before, likewise")
    parser.add_argument("--check-rows", type=_positive, default=64, help="rows whose outputs are checked (%(default)s)")
    parser.add_argument(
        "--explain",
        nargs="?",
        const=_HERE,
        choices=(_HERE, *DEVICES),
        help="measure nothing: print what each case costs on this GPU, which need not be there (default: this machine)",
    )
    parser.add_argument("--tflops", type=float, help="of products, for --explain (default: known, or measured)")
    parser.add_argument("--gbytes", type=float, help="GB/s of memory, for --explain (default: known, or measured)")
    parser.add_argument("--fresh", action="store_true", help="forget what --out holds")
    parser.add_argument("--retry", action="store_true", help="try again what failed in an earlier run")
    _add_common_options(parser)
    parser.set_defaults(run=_bench_kernels)


def _add_compile_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "compile",
        help="registers, spills and shared memory of the Triton kernels on each GPU generation; needs no GPU",
        description="Compiles every configuration of the Triton kernels ahead of time and prints what it takes.",
        epilog=COMPILE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--capabilities", nargs="+", type=int, choices=(80, 90, 100), default=[80, 90, 100], help="default: all"
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="kernels whose name has this text, such as jsd")
    parser.set_defaults(run=_bench_compile)


def _add_rollout_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "rollout",
        help="tokens a second of SGLang servers, by how many requests they have at once",
        description="Starts the servers of a configuration (or takes those that sglang.urls names) and has them "
        "sample from random prompts, with the configuration's temperature, top_p and top_k.",
        epilog=ROLLOUT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_server_options(parser)
    parser.add_argument(
        "--requests", type=_positive, default=32, help="at each concurrency, or as many as that (default %(default)s)"
    )
    parser.add_argument("--prompt-tokens", type=_positive, default=64, help="of each prompt (default %(default)s)")
    parser.add_argument("--response-tokens", type=_positive, default=32, help="at most (default %(default)s)")
    parser.add_argument(
        "--concurrency", nargs="+", type=_positive, default=[1, 4, 16, 64], metavar="N", help="default 1 4 16 64"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts (default %(default)s)")
    parser.set_defaults(run=_bench_rollout)


def _add_sync_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "sync",
        help="seconds and GB/s of bringing a model's weights to SGLang servers, by each transport",
        description="Starts the servers of a configuration (or takes those that sglang.urls names) and pushes the "
        "model's weights to them, in model.dtype and buckets of rollout.bucket_mb, by each transport: one push that "
        "is not counted, then the repeats. After each push, a token is sampled to see that it has the new label.",
        epilog=SYNC_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_server_options(parser)
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=TRANSPORTS, help="default: all")
    parser.add_argument("--repeats", type=_positive, default=3, help="timed pushes of each (default %(default)s)")
    parser.set_defaults(run=_bench_sync)


def _add_packing_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "packing",
        help="padding, and seconds of both passes, of padded and packed microbatches of sampled responses",
        description="Samples one step's responses as the configuration says, in one process, and times the teacher's "
        "pass and the student's (forward, loss, backward) over them: padded microbatches of as many sequences as the "
        "configuration says, then padded and packed ones of as many tokens as the largest of those. The groupings "
        "take turns, once untimed and then --repeats times; times are medians.",
        epilog=PACKING_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_server_options(parser)
    parser.add_argument("--repeats", type=_positive, default=3, help="timed repeats of each (default %(default)s)")
    parser.set_defaults(run=_bench_packing)


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file, as of copsd train")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings to change; before the options")
    parser.add_argument("--csv", type=Path, help="append the numbers to this file")


def _add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jsd-weight", type=float, default=0.5, help="teacher's weight in jsd (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits (default %(default)s)")
    parser.add_argument("--frozen-weight", action="store_true", help="no gradient for the weight, as under LoRA")
    parser.add_argument(
        "--threads", type=_positive, default=torch.get_num_threads(), help="torch threads (default: torch's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs (default %(default)s)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _shape(text: str) -> tuple[int, int, int]:
    try:
        rows, hidden, vocab = (_positive(number) for number in text.split(","))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not R,H,V") from error
    return rows, hidden, vocab


def _clip(text: str) -> float | None:
    try:
        return None if text == "none" else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor none") from error


def _bench_loss(args: argparse.Namespace, argv: list[str]) -> int:
    case = Case(
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
    measurements = measure(case, ("fused", "dense"), Plan(1, args.repeats, args.check_rows))
    console = Console()
    console.print(comparison(case, *measurements))
    if args.csv:
        append(args.csv, [Result(case, measurement, here("cpu", argv)) for measurement in measurements])
    failed = [measurement for measurement in measurements if measurement.median_ms is None]
    for measurement in failed:
        console.print(f"{measurement.implementation}: {measurement.note}", markup=False)
    return _FAILED if failed else 0


def _bench_kernels(args: argparse.Namespace, argv: list[str]) -> int:
    if args.explain not in (None, _HERE):
        return _explain(args, "cuda", args.explain)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise UserError(describe("--device", device, "torch finds no CUDA device here", "Use --device cpu."))
    if args.explain:
        return _explain(args, device, device_name(device))
    preset = _preset(args, device)
    source = here(device, argv)
    plan = Plan(
        warmup=preset.warmup if args.warmup is None else args.warmup,
        repeats=args.repeats or preset.repeats,
        check_rows=args.check_rows,
    )
    out = args.out or Path("benchmarks") / slug(source.device_name)
    bench_kernels(_jobs(args, preset, device), plan, out, source, fresh=args.fresh, retry=args.retry)
    return 0


def _explain(args: argparse.Namespace, device: str, name: str) -> int:
    jobs = _jobs(args, _preset(args, device), device)
    found = find_device(name, next(iter(jobs)), args.tflops, args.gbytes)
    for case, names in jobs.items():
        Console(highlight=False).print(cost_table(case, names, found))
    return 0


def _preset(args: argparse.Namespace, device: str) -> Preset:
    return PRESETS[args.preset or {"cpu": "cpu", "cuda": "gpu"}[device]]


def _bench_compile(args: argparse.Namespace, argv: list[str]) -> int:
    # Only here: Triton is not there on every machine that can run the other commands.
    from copsd_tools.bench.compile import resource_table

    Console().print(resource_table(args.capabilities, args.only))
    return 0


def _bench_rollout(args: argparse.Namespace, argv: list[str]) -> int:
    config = load_for_servers(args.config, args.overrides)
    load = Load(args.requests, args.prompt_tokens, args.response_tokens, args.seed)
    speeds = bench_rollout(config, load, args.concurrency)
    Console().print(rollout_table(speeds))
    if args.csv:
        append_lines(args.csv, speeds, here("cuda" if config.sglang.devices else "cpu", argv))
    return 0


def _bench_sync(args: argparse.Namespace, argv: list[str]) -> int:
    speeds = bench_sync(load_for_servers(args.config, args.overrides), args.transports, args.repeats)
    Console().print(sync_table(speeds))
    if args.csv:
        append_lines(args.csv, speeds, here("cuda" if torch.cuda.is_available() else "cpu", argv))
    return 0


def _bench_packing(args: argparse.Namespace, argv: list[str]) -> int:
    # Only here: no other command waits for Megatron.
    from copsd_tools.bench.packing import bench_packing, packing_table

    with tempfile.TemporaryDirectory() as folder:
        overrides = [*args.overrides, f"run.dir={folder}", "log.tensorboard=false"]
        loaded = load_config(args.config, overrides)
        check(loaded)
        lines = bench_packing(loaded.config, args.repeats)
    Console().print(packing_table(lines))
    if args.csv:
        append_lines(args.csv, lines, here("cuda" if torch.cuda.is_available() else "cpu", argv))
    return 0


def _jobs(args: argparse.Namespace, preset: Preset, device: str) -> dict[Case, tuple[str, ...]]:
    """Cases of the preset, with what the command line says instead, and the implementations to measure each with.

    Raises:
        UserError: an option that is not of what is to be computed.
    """
    offered = tuple(SUBJECTS[args.what].implementations)
    for name in args.implementations or ():
        if name not in offered:
            rule = f"computes no {args.what}"
            raise UserError(describe("--implementations", name, rule, f"Choose of {', '.join(offered)}."))
    for option, value in (("--kinds", args.kinds), ("--entry-clips", args.entry_clips)):
        if value and args.what != "divergence":
            raise UserError(describe(option, value, f"{args.what} has none", "Leave the option out."))
    jobs: dict[Case, tuple[str, ...]] = {}
    for sweep, ranks in product(preset.sweeps, args.tensor_parallel):
        shapes = args.shapes or sweep.shapes
        if args.rows:
            shapes = tuple(dict.fromkeys((rows, *shape[1:]) for shape in shapes for rows in args.rows))
        chosen = Sweep(shapes, args.kinds or sweep.kinds, args.entry_clips or sweep.entry_clips)
        base = Case(
            *shapes[0],
            what=args.what,
            dtype=args.dtype or preset.dtype,
            spec=DivergenceSpec(jsd_weight=args.jsd_weight, temperature=args.temperature),
            frozen_weight=args.frozen_weight,
            scratch_mb=args.scratch_mb,
            tensor_parallel=ranks,
            device=device,
            threads=args.threads,
            seed=args.seed,
        )
        for case in chosen.cases(base):
            jobs.setdefault(case, tuple(args.implementations or sweep.implementations or offered))
    return jobs
