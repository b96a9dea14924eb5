"""``copsd demo``: the whole job, small: train a bilingual model, distil it crosslingually, show what it learned.

Stage 1 trains a small model from nothing with the sft objective: fluent in English, hardly taught Swahili. Stage 2 is
COPSD: the model writes answers to Swahili problems and learns from itself reading the English problem and solution.
Both run on the trainer that runs on clusters. A finished stage is not repeated.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from copsd_tools.command_line.arguments import new_parser, override, path, whole
from copsd_tools.command_line.checkout import ROOT
from copsd_tools.command_line.outputs import check_folder
from copsd_tools.demo.folders import Folders
from copsd_tools.demo.report import draw_plot, show
from megatron_copsd.errors import UserError, describe
from megatron_copsd.records.reader import read_metrics
from megatron_copsd.signals import run_apart

EXAMPLES = """examples:
  copsd demo
  copsd demo --seed 1 --out runs/demo1
  copsd demo --fresh
"""
_CONFIGS = ROOT / "configs"


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = new_parser("demo", __doc__, EXAMPLES)
    parser.add_argument("--out", type=path, default=Path("runs/demo"), help="folder of all artefacts")
    parser.add_argument("--seed", type=whole, default=0, help="seed of data, initialisation and sampling")
    parser.add_argument("--fresh", action="store_true", help="delete --out first")
    args = parser.parse_args(argv)
    folders = Folders(args.out)
    for folder in (folders.out, folders.data, folders.sft, folders.copsd):
        check_folder(folder, "--out")
    if args.fresh and args.out.exists():
        foreign = sorted({entry.name for entry in args.out.iterdir()} - folders.names)
        if args.out.is_symlink() or foreign or not folders.data.is_dir():
            found = f" ({foreign[0]} is none of its parts)" if foreign else ""
            rule = f"--fresh deletes this folder, and it was not made by copsd demo alone{found}"
            raise UserError(describe("--out", str(args.out), rule, "Choose another folder."))
        shutil.rmtree(args.out)
    sft = ("demo_sft.yaml", folders.sft, folders.data / "model", ("en", "en", "sw", "sw"))
    copsd = ("demo_copsd.yaml", folders.copsd, folders.sft / "hf", ("sw", "en"))
    minutes = {
        "data": _stage(folders.data / "model", ["demo-data", "--out", folders.data, "--seed", args.seed]),
        "1: sft": _stage(folders.sft / "hf", *_commands(folders, args.seed, *sft)),
        "2: copsd": _stage(folders.copsd / "hf", *_commands(folders, args.seed, *copsd)),
    }
    metrics = read_metrics(folders.copsd)
    draw_plot(folders, metrics)
    show(folders, metrics, minutes, args.seed)
    return 0


def _commands(
    folders: Folders, seed: int, config: str, run: Path, model: Path, languages: Sequence[str]
) -> list[list[object]]:
    """Return the two commands of a stage: train, and export what was trained; ``languages`` are its sources'."""
    settings = [
        override("run.dir", str(run)),
        f"run.seed={seed}",
        override("model.path", str(model)),
        *_data_overrides(folders, {"train": languages, "eval": ("sw", "en")}),
    ]
    return [["train", _CONFIGS / config, *settings, *_processes()], ["export", run, "--out", run / "hf"]]


def _data_overrides(folders: Folders, languages: Mapping[str, Sequence[str]]) -> list[str]:
    prefix = {"train": "train", "eval": "heldout"}
    return [
        override(f"data.{section}.{i}.path", f"{folders.data}/{prefix[section]}_{language}.jsonl")
        for section, sources in languages.items()
        for i, language in enumerate(sources)
    ]


def _processes() -> list[str]:
    """Two replicas where there are two cores: matrices this small leave a second thread idle."""
    return ["--nproc", "2"] if (os.cpu_count() or 1) >= 2 else []


def _stage(product: Path, *commands: Sequence[object]) -> float:
    """Run commands one after the other unless their product is there; returns minutes."""
    if product.exists():
        print(f"{product} is there already; --fresh starts over", flush=True)
        return 0.0
    start = time.monotonic()
    for command in commands:
        words = [str(word) for word in command]
        print(f"\n$ copsd {' '.join(words)}", flush=True)
        code = run_apart([sys.executable, "-m", "copsd_tools.cli", *words], "what runs is asked to end")
        if code:
            sys.exit(code)  # the command has said why
    return (time.monotonic() - start) / 60
