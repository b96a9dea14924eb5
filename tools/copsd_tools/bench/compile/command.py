"""``copsd bench compile``: compile every configuration of the Triton kernels ahead of time and print what it takes."""

from __future__ import annotations

from copsd_tools.command_line.arguments import new_parser

EXAMPLES = """examples:
  copsd bench compile
  copsd bench compile --capabilities 90 --only "streaming statistics"
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    about = "Compiles every configuration of the Triton kernels ahead of time and prints what it takes."
    parser = new_parser("bench compile", about, EXAMPLES)
    parser.add_argument(
        "--capabilities", nargs="+", type=int, choices=(80, 90, 100), default=[80, 90, 100], help="default: all"
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="kernels whose name has this text, such as jsd")
    args = parser.parse_args(argv)

    from rich.console import Console

    from copsd_tools.bench.compile.resources import resource_table

    Console().print(resource_table(args.capabilities, args.only))
    return 0
