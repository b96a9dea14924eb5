"""``copsd bench rollout``: tokens a second of SGLang servers, by how many requests they have at once."""

from __future__ import annotations

import argparse

from copsd_tools.bench.csv_lines import add_csv_option, append_lines, check_csv
from copsd_tools.command_line.arguments import add_configuration, new_parser, positive, whole

EXAMPLES = """examples:
  copsd bench rollout configs/smollm2_mgsm_sw.yaml
  copsd bench rollout CONFIG model.dtype=bfloat16 --concurrency 1 8 --response-tokens 128 --csv runs/bench/rollout.csv
  copsd bench rollout CONFIG 'sglang.urls=[http://127.0.0.1:30000]'     a server that runs already (copsd serve)
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    args = _parser().parse_intermixed_args(argv)

    from rich.console import Console

    from copsd_tools.bench.provenance import Provenance, here
    from copsd_tools.bench.servers.clients import load_for_servers
    from copsd_tools.bench.servers.rollout import Load, RolloutSpeed, bench_rollout, rollout_table

    check_csv(args.csv, RolloutSpeed, Provenance)
    config = load_for_servers(args.config, args.overrides)
    load = Load(args.requests, args.prompt_tokens, args.response_tokens, args.seed)
    speeds = bench_rollout(config, load, args.concurrency)
    Console().print(rollout_table(speeds))
    if args.csv:
        append_lines(args.csv, speeds, here("cuda" if config.sglang.devices else "cpu", ["rollout", *argv]))
    return 0


def _parser() -> argparse.ArgumentParser:
    about = (
        "Starts the servers of a configuration (or takes those that sglang.urls names) and has them "
        "sample from random prompts, with the configuration's temperature, top_p and top_k."
    )
    parser = new_parser("bench rollout", about, EXAMPLES)
    add_configuration(parser, "YAML file, as of copsd train")
    add_csv_option(parser)
    parser.add_argument(
        "--requests", type=positive, default=32, help="at each concurrency, or as many as that (default %(default)s)"
    )
    parser.add_argument("--prompt-tokens", type=positive, default=64, help="of each prompt (default %(default)s)")
    parser.add_argument("--response-tokens", type=positive, default=32, help="at most (default %(default)s)")
    parser.add_argument(
        "--concurrency", nargs="+", type=positive, default=[1, 4, 16, 64], metavar="N", help="default 1 4 16 64"
    )
    parser.add_argument("--seed", type=whole, default=0, help="seed of the prompts (default %(default)s)")
    return parser
