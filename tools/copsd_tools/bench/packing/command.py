"""``copsd bench packing``: what padding costs the teacher's and the student's pass, on responses the model samples."""

from __future__ import annotations

import argparse
import tempfile

from copsd_tools.bench.csv_lines import add_csv_option, append_lines, check_csv
from copsd_tools.command_line.arguments import add_configuration, new_parser, override, positive

EXAMPLES = """examples:
  copsd bench packing configs/smollm2_mgsm_sw.yaml
  copsd bench packing CONFIG rollout.prompts_per_step=64 optimizer.micro_batch_tokens=16384 --csv runs/bench/packing.csv
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    args = _parser().parse_intermixed_args(argv)

    from rich.console import Console

    from copsd_tools.bench.packing.passes import PackingSpeed, bench_packing, packing_table
    from copsd_tools.bench.provenance import Provenance, here, present_device
    from megatron_copsd.config.check import check
    from megatron_copsd.config.load import load_config

    check_csv(args.csv, PackingSpeed, Provenance)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*args.overrides, override("run.dir", folder), "log.tensorboard=false"]
        loaded = load_config(args.config, overrides)
        check(loaded)
        lines = bench_packing(loaded.config, args.repeats)
    Console().print(packing_table(lines))
    if args.csv:
        append_lines(args.csv, lines, here(present_device(), ["packing", *argv]))
    return 0


def _parser() -> argparse.ArgumentParser:
    about = (
        "Samples one step's responses as the configuration says, in one process, and times the teacher's "
        "pass and the student's (forward, loss, backward) over them: padded microbatches of as many sequences as the "
        "configuration says, then padded and packed ones of as many tokens as the largest of those. The groupings "
        "take turns, once untimed and then --repeats times; times are medians."
    )
    parser = new_parser("bench packing", about, EXAMPLES)
    add_configuration(parser, "YAML file, as of copsd train")
    add_csv_option(parser)
    parser.add_argument("--repeats", type=positive, default=3, help="timed repeats of each (default %(default)s)")
    return parser
