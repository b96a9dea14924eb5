"""``copsd sglang-env``: make the Python environment that SGLang's servers run in (``make sglang``).

SGLang pins its own torch and transformers, so it lives apart from the trainer and is spoken to over HTTP. About 11 GB.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

from copsd_tools.command_line.arguments import new_parser
from copsd_tools.command_line.checkout import ROOT
from copsd_tools.command_line.outputs import check_folder
from copsd_tools.command_line.terminal import say
from megatron_copsd.errors import UserError, describe

EXAMPLES = """examples:
  copsd sglang-env                       in ~/.cache/megatron_copsd, shared by all checkouts
  COPSD_SGLANG_ENV=/scratch/sglang copsd sglang-env
"""
VERSION = "0.5.23"
_CONSTRAINTS = ROOT / "constraints-sglang.txt"


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = new_parser("sglang-env", __doc__, EXAMPLES)
    parser.add_argument("--fresh", action="store_true", help="make it anew")
    args = parser.parse_args(argv)

    from megatron_copsd.rollout.sglang.process import default_python

    python = default_python()
    folder = python.parents[1]
    stamp = folder / ".installed"
    wanted = f"sglang {VERSION}\n{_CONSTRAINTS.read_text(encoding='utf-8')}"
    check_folder(folder, "COPSD_SGLANG_ENV")
    if args.fresh and folder.exists():
        if not (folder / "pyvenv.cfg").is_file():
            rule = "--fresh deletes this folder, and it is no Python environment"
            raise UserError(describe("COPSD_SGLANG_ENV", str(folder), rule, "Name another folder."))
        shutil.rmtree(folder, ignore_errors=True)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        say(f"SGLang's environment is there: {folder}")
        return 0
    say(f"installing SGLang {VERSION} into {folder}: about 11 GB, some minutes")
    # Of the many files few are ever imported, and those are compiled when they are.
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile"]
    _run([sys.executable, "-m", "venv", str(folder)])
    _run([*pip, "--upgrade", "pip>=24"])
    _run([*pip, "--constraint", str(_CONSTRAINTS), f"sglang=={VERSION}"])
    stamp.write_text(wanted, encoding="utf-8")
    say(f"done: {python}")
    return 0


def _run(command: list[str]) -> None:
    done = subprocess.run(command)
    if done.returncode != 0:
        rule = f"ended with exit code {done.returncode}"
        raise UserError(describe("command", " ".join(command), rule, "Its output above says why."))
