"""``copsd bench kernels``: every implementation side by side, over shapes and settings, a folder of results."""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from copsd_tools.bench.kernels.arguments import add_loss_options, clip, shape
from copsd_tools.bench.kernels.catalogue import CATALOGUE
from copsd_tools.bench.kernels.explain.devices import DEVICES
from copsd_tools.bench.kernels.presets import KINDS, PRESETS, Preset, Sweep
from copsd_tools.command_line.arguments import above_zero, new_parser, path, positive, whole
from copsd_tools.command_line.outputs import check_folder
from megatron_copsd.errors import UserError, describe

if TYPE_CHECKING:
    from copsd_tools.bench.kernels.cases import Case

EXAMPLES = """examples:
  copsd bench kernels                                    the preset of this machine's device
  copsd bench kernels --preset memory --out runs/bench/memory
  copsd bench kernels --shapes 1024,576,49152 --kinds jsd --entry-clips none 0.05 --implementations fused dense
  copsd bench kernels --what cross_entropy --shapes 1024,576,49152 --threads 1
  copsd bench kernels --explain --shapes 1024,576,49152  products, traffic and bytes on this machine; nothing is run
  copsd bench kernels --explain H200 --shapes 8192,4096,151936 --kinds forward_kl jsd --frozen-weight
  copsd bench kernels --explain H200 --what log_probs --tflops 800
  copsd bench kernels --shapes 1024,4096,151936 --rows 1024 4096 16384 --dtype bfloat16 --tensor-parallel 1 2

"""
_HERE = "here"


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    args = _parser().parse_args(argv)
    if args.explain not in (None, _HERE):
        return _explain(args, "cuda", args.explain)

    from copsd_tools.bench.kernels.measuring.worker import Plan
    from copsd_tools.bench.kernels.results.folder import bench_kernels
    from copsd_tools.bench.kernels.results.report import slug
    from copsd_tools.bench.provenance import device_name, here

    device = _device(args.device)
    if args.explain:
        return _explain(args, device, device_name(device))
    preset = _preset(args, device)
    source = here(device, ["kernels", *argv])
    plan = Plan(
        warmup=preset.warmup if args.warmup is None else args.warmup,
        repeats=args.repeats or preset.repeats,
        check_rows=args.check_rows,
    )
    out = args.out or Path("benchmarks") / slug(source.device_name)
    check_folder(out, "--out")
    bench_kernels(_jobs(args, preset, device), plan, out, source, fresh=args.fresh, retry=args.retry)
    return 0


def _parser() -> argparse.ArgumentParser:
    about = (
        "A fused loss, its peers, and the matrix products alone (the floor), over shapes and settings. "
        "A folder receives results.csv (a line as soon as it is measured), results.md and plots. Running again adds "
        "what is missing; what could not run has a line that says why. --explain measures nothing: it prints what "
        "arithmetic and the code say of the same cases."
    )
    listed = "\n\n".join(
        f"implementations of {what}: {offer.description}\n"
        + "\n".join(f"  {name:<22} {description}" for name, description in offer.implementations.items())
        for what, offer in CATALOGUE.items()
    )
    names = dict.fromkeys(name for offer in CATALOGUE.values() for name in offer.implementations)
    parser = new_parser("bench kernels", about, EXAMPLES + listed)
    parser.add_argument("--what", choices=CATALOGUE, default="divergence", help="to compute (default %(default)s)")
    parser.add_argument("--out", type=path, help="folder (default benchmarks/NAME-OF-THE-DEVICE)")
    parser.add_argument("--preset", choices=PRESETS, help="named set of cases (default: cpu or gpu, by the device)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default %(default)s")
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="R,H,V", help="instead of the preset's")
    parser.add_argument("--rows", nargs="+", type=positive, metavar="R", help="instead of the R of each shape")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="divergences, instead of the preset's")
    parser.add_argument("--entry-clips", nargs="+", type=clip, metavar="NATS", help='caps, or "none", likewise')
    parser.add_argument("--implementations", nargs="+", choices=names, metavar="NAME", help="likewise")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of hidden and weight, likewise")
    parser.add_argument("--tensor-parallel", nargs="+", type=positive, default=[1], metavar="N", help="ranks (1)")
    parser.add_argument(
        "--scratch-mb", type=above_zero, help="loss.scratch_mb of the fused loss (default: the loss's own)"
    )
    parser.add_argument("--repeats", type=positive, help="timed repeats of each, instead of the preset's")
    parser.add_argument("--warmup", type=whole, help="untimed repeats before, likewise")
    parser.add_argument("--check-rows", type=positive, default=64, help="rows whose outputs are checked (%(default)s)")
    parser.add_argument(
        "--explain",
        nargs="?",
        const=_HERE,
        choices=(_HERE, *DEVICES),
        help="measure nothing: print what each case costs on this GPU, which need not be there (default: this machine)",
    )
    parser.add_argument("--tflops", type=above_zero, help="of products, for --explain (default: known, or measured)")
    parser.add_argument("--gbytes", type=above_zero, help="GB/s of memory, for --explain (default: known, or measured)")
    parser.add_argument("--fresh", action="store_true", help="forget what --out holds")
    parser.add_argument("--retry", action="store_true", help="try again what failed in an earlier run")
    add_loss_options(parser)
    return parser


def _device(wanted: str) -> str:
    from copsd_tools.bench.provenance import present_device

    if wanted == "cuda" and present_device() != "cuda":
        raise UserError(describe("--device", wanted, "torch finds no CUDA device here", "Use --device cpu."))
    return present_device() if wanted == "auto" else wanted


def _preset(args: argparse.Namespace, device: str) -> Preset:
    return PRESETS[args.preset or {"cpu": "cpu", "cuda": "gpu"}[device]]


def _explain(args: argparse.Namespace, device: str, name: str) -> int:
    from rich.console import Console

    from copsd_tools.bench.kernels.explain.costs import cost_table, find_device

    jobs = _jobs(args, _preset(args, device), device)
    found = find_device(name, next(iter(jobs)), args.tflops, args.gbytes)
    for case, names in jobs.items():
        Console(highlight=False).print(cost_table(case, names, found))
    return 0


def _jobs(args: argparse.Namespace, preset: Preset, device: str) -> dict[Case, tuple[str, ...]]:
    """Cases of the preset, with what the command line says instead, and the implementations to measure each with.

    Raises:
        UserError: an option that is not of what is to be computed.
    """
    import torch

    from copsd_tools.bench.kernels.cases import Case
    from megatron_copsd.loss.divergence import DivergenceSpec

    offered = tuple(CATALOGUE[args.what].implementations)
    _check_options(args, offered)
    jobs: dict[Case, tuple[str, ...]] = {}
    for sweep, ranks in product(preset.sweeps, args.tensor_parallel):
        shapes = args.shapes or sweep.shapes
        if args.rows:
            shapes = tuple(dict.fromkeys((rows, hidden, vocab) for _, hidden, vocab in shapes for rows in args.rows))
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
            threads=args.threads or torch.get_num_threads(),
            seed=args.seed,
        )
        for case in chosen.cases(base):
            jobs.setdefault(case, tuple(args.implementations or sweep.implementations or offered))
    return jobs


def _check_options(args: argparse.Namespace, offered: tuple[str, ...]) -> None:
    for name in args.implementations or ():
        if name not in offered:
            rule = f"computes no {args.what}"
            raise UserError(describe("--implementations", name, rule, f"Choose of {', '.join(offered)}."))
    for option, value in (("--kinds", args.kinds), ("--entry-clips", args.entry_clips)):
        if value and args.what != "divergence":
            raise UserError(describe(option, value, f"{args.what} has none", "Leave the option out."))
