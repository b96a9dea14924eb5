"""``copsd sdrrl``: make the data of SDRRL and of the supervised baselines, and look at them."""

from __future__ import annotations

import argparse
from pathlib import Path

from copsd_tools.command_line.arguments import add_configuration, new_parser, path, positive
from copsd_tools.command_line.outputs import check_file_and_parents

EXAMPLES = """examples:
  copsd sdrrl build configs/sdrrl_smollm2.yaml                    the rows that copsd train then reads
  copsd sdrrl build CONFIG sdrrl.targets='[YOR,HAU]' --check      what is missing, and how large the build is
  copsd sdrrl build CONFIG                                        again after a stop: goes on where it was
  copsd sdrrl show runs/sdrrl                                     counts by subset, language and reason
  copsd sdrrl show runs/sdrrl --rows 5 --subset TL --plot counts.png
  copsd sdrrl show runs/sdrrl --rows 5 --rejected
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = new_parser("sdrrl", __doc__, EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="own responses, translations, filters, rows")
    add_configuration(build, "YAML file with a section sdrrl; the settings to change come before the options")
    build.set_defaults(run=_build)
    build.add_argument("--overwrite", action="store_true", help="move an earlier build aside, to DIR.1 or so")
    build.add_argument("--check", action="store_true", help="say what is missing and what there is to do, and stop")
    show = commands.add_parser("show", help="what a build has made, and what it has rejected and why")
    show.set_defaults(run=_show)
    show.add_argument("folder", type=path, metavar="DIR", help="folder of the build, or its rows.jsonl")
    show.add_argument("--rows", type=positive, default=None, help="show so many rows with all that is known of them")
    show.add_argument("--subset", help="of this subset alone: LL, TL, LT, TT, mt or comp")
    show.add_argument("--language", help="of this target language alone")
    show.add_argument("--rejected", action="store_true", help="what was rejected instead of what was kept")
    show.add_argument("--plot", type=path, help="write the counts as a picture")
    args = parser.parse_args(argv)
    code: int = args.run(args)
    return code


def _build(args: argparse.Namespace) -> int:
    from copsd_tools.sdrrl.build import build

    return build(args.config, args.overrides, overwrite=args.overwrite, check_only=args.check)


def _show(args: argparse.Namespace) -> int:
    from copsd_tools.sdrrl.show import show

    if args.plot:
        check_file_and_parents(args.plot, "--plot")
    folder: Path = args.folder
    show(folder, rows=args.rows, subset=args.subset, spoken=args.language, rejected=args.rejected, plot=args.plot)
    return 0
