"""``copsd bench sync``: time and bandwidth of bringing a model's weights to SGLang servers, by each transport."""

from __future__ import annotations

import argparse

from copsd_tools.bench.csv_lines import add_csv_option, append_lines, check_csv
from copsd_tools.command_line.arguments import add_configuration, new_parser, positive

EXAMPLES = """examples:
  copsd bench sync configs/smollm2_mgsm_sw.yaml
  copsd bench sync CONFIG model.dtype=bfloat16 --transports distributed tensor --repeats 5 --csv runs/bench/sync.csv
  copsd bench sync CONFIG rollout.bucket_mb=64 sglang.folder=/dev/shm/weights --transports disk
"""
TRANSPORTS = ("disk", "distributed", "tensor")


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    args = _parser().parse_intermixed_args(argv)

    from rich.console import Console

    from copsd_tools.bench.provenance import Provenance, here, present_device
    from copsd_tools.bench.servers.clients import load_for_servers
    from copsd_tools.bench.servers.sync import SyncSpeed, bench_sync, sync_table

    check_csv(args.csv, SyncSpeed, Provenance)
    speeds = bench_sync(load_for_servers(args.config, args.overrides), args.transports, args.repeats)
    Console().print(sync_table(speeds))
    if args.csv:
        append_lines(args.csv, speeds, here(present_device(), ["sync", *argv]))
    return 0


def _parser() -> argparse.ArgumentParser:
    about = (
        "Starts the servers of a configuration (or takes those that sglang.urls names) and pushes the "
        "model's weights to them, in model.dtype and buckets of rollout.bucket_mb, by each transport: one push that "
        "is not counted, then the repeats. After each push, a token is sampled to see that it has the new label."
    )
    parser = new_parser("bench sync", about, EXAMPLES)
    add_configuration(parser, "YAML file, as of copsd train")
    add_csv_option(parser)
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=TRANSPORTS, help="default: all")
    parser.add_argument("--repeats", type=positive, default=3, help="timed pushes of each (default %(default)s)")
    return parser
