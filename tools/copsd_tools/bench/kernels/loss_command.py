"""``copsd bench loss``: the fused divergence against dense eager autograd, one shape, a table in the terminal."""

from __future__ import annotations

import argparse

from copsd_tools.bench.csv_lines import add_csv_option
from copsd_tools.bench.kernels.arguments import add_loss_options
from copsd_tools.bench.kernels.presets import KINDS
from copsd_tools.command_line.arguments import above_zero, new_parser, positive
from copsd_tools.command_line.outputs import check_file_and_parents

EXAMPLES = """examples:
  copsd bench loss
  copsd bench loss --rows 2048 --hidden 2048 --vocab 151936 --dtype bfloat16 --repeats 3
  copsd bench loss --kind jsd --entry-clip 0.05 --frozen-weight --scratch-mb 32 --csv runs/bench/loss.csv
"""
_FAILED = 1


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code: 0 both were measured, 1 one was not."""
    args = _parser().parse_args(argv)
    if args.csv:
        check_file_and_parents(args.csv, "--csv")

    import torch
    from rich.console import Console

    from copsd_tools.bench.kernels.cases import Case
    from copsd_tools.bench.kernels.measuring.measure import measure
    from copsd_tools.bench.kernels.measuring.worker import Plan
    from copsd_tools.bench.kernels.results.file import Result, append, read
    from copsd_tools.bench.kernels.results.report import comparison
    from copsd_tools.bench.provenance import here
    from megatron_copsd.loss.divergence import DivergenceSpec

    case = Case(
        rows=args.rows,
        hidden=args.hidden,
        vocab=args.vocab,
        dtype=args.dtype,
        spec=DivergenceSpec(args.kind, args.jsd_weight, args.temperature, args.entry_clip, args.token_clip),
        frozen_weight=args.frozen_weight,
        scratch_mb=args.scratch_mb,
        threads=args.threads or torch.get_num_threads(),
        seed=args.seed,
    )
    if args.csv and args.csv.exists() and args.csv.stat().st_size:
        read(args.csv)  # refuses what this command did not write
    measurements = measure(case, ("fused", "dense"), Plan(1, args.repeats, args.check_rows))
    console = Console()
    console.print(comparison(case, *measurements))
    if args.csv:
        append(args.csv, [Result(case, measurement, here("cpu", ["loss", *argv])) for measurement in measurements])
    failed = [measurement for measurement in measurements if measurement.median_ms is None]
    for measurement in failed:
        console.print(f"{measurement.implementation}: {measurement.note}", markup=False)
    return _FAILED if failed else 0


def _parser() -> argparse.ArgumentParser:
    about = (
        "Forward and backward of the fused linear divergence against dense eager autograd (matrix product, "
        "log_softmax, sum). Times are medians of interleaved repeats in one process; peak memory is that of a fresh "
        "process each, above its inputs; gradient errors are relative to the float64 oracle on the first rows."
    )
    parser = new_parser("bench loss", about, EXAMPLES)
    parser.add_argument("--rows", type=positive, default=1024, help="response rows R (default %(default)s)")
    parser.add_argument("--hidden", type=positive, default=576, help="hidden size H (default %(default)s)")
    parser.add_argument("--vocab", type=positive, default=49152, help="vocabulary V (default %(default)s)")
    parser.add_argument("--kind", choices=KINDS, default="forward_kl", help="divergence")
    parser.add_argument("--entry-clip", type=above_zero, help="cap of each vocabulary entry (default none)")
    parser.add_argument("--token-clip", type=above_zero, help="cap of each row (default none)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of hidden and weight")
    parser.add_argument("--scratch-mb", type=above_zero, help="loss.scratch_mb (default: the loss's own)")
    parser.add_argument("--repeats", type=positive, default=5, help="timed repeats of each (default %(default)s)")
    parser.add_argument(
        "--check-rows", type=positive, default=16, help="rows whose gradients are checked (%(default)s)"
    )
    add_csv_option(parser)
    add_loss_options(parser)
    return parser
