"""``copsd demo``: the whole job, small: train a bilingual model, distil it crosslingually, show what it learned.

Stage 1 trains a small model from nothing with the sft objective: fluent in English, hardly taught Swahili. Stage 2 is
COPSD: the model writes answers to Swahili problems and learns from itself reading the English problem and solution.
Both run on the trainer that runs on clusters. A finished stage is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_copsd.errors import UserError, describe

EXAMPLES = """examples:
  copsd demo
  copsd demo --seed 1 --out runs/demo1
  copsd demo --fresh
"""
LANGUAGES = ("swahili", "english")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@dataclass(frozen=True)
class Folders:
    """Where the demonstration writes."""

    out: Path

    @property
    def data(self) -> Path:
        return self.out / "data"

    @property
    def sft(self) -> Path:
        return self.out / "sft"

    @property
    def copsd(self) -> Path:
        return self.out / "copsd"

    @property
    def plot(self) -> Path:
        return self.out / "demo.png"


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="copsd demo", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of all artefacts")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, initialisation and sampling")
    parser.add_argument("--fresh", action="store_true", help="delete --out first")
    args = parser.parse_args(argv)
    if args.fresh and args.out.exists():
        if not (args.out / "data").is_dir():
            rule = "--fresh deletes this folder, and it was not made by copsd demo"
            raise UserError(describe("--out", str(args.out), rule, "Choose another folder."))
        shutil.rmtree(args.out)
    folders = Folders(args.out)
    sft = ("demo_sft.yaml", folders.sft, folders.data / "model", ("en", "en", "sw", "sw"))
    copsd = ("demo_copsd.yaml", folders.copsd, folders.sft / "hf", ("sw", "en"))
    minutes = {
        "data": _stage(folders.data / "model", ["demo-data", "--out", folders.data, "--seed", args.seed]),
        "1: sft": _stage(folders.sft / "hf", *_commands(folders, args.seed, *sft)),
        "2: copsd": _stage(folders.copsd / "hf", *_commands(folders, args.seed, *copsd)),
    }
    evaluations = read_evaluations(folders.copsd)
    _plot(folders, evaluations)
    _show(folders, evaluations, minutes, args.seed)
    return 0


def _commands(
    folders: Folders, seed: int, config: str, run: Path, model: Path, languages: Sequence[str]
) -> list[list[object]]:
    """Return the two commands of a stage: train, and export what was trained; ``languages`` are its sources'."""
    settings = [
        f"run.dir={run}",
        f"run.seed={seed}",
        f"model.path={model}",
        *_data_overrides(folders, {"train": languages, "eval": ("sw", "en")}),
    ]
    return [["train", CONFIGS / config, *settings, *_processes()], ["export", run, "--out", run / "hf"]]


def _data_overrides(folders: Folders, languages: Mapping[str, Sequence[str]]) -> list[str]:
    prefix = {"train": "train", "eval": "heldout"}
    return [
        f"data.{section}.{i}.path={folders.data}/{prefix[section]}_{language}.jsonl"
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
        done = subprocess.run([sys.executable, "-m", "copsd_tools.cli", *words], check=False)
        if done.returncode:
            sys.exit(done.returncode)  # the command has said why
    return (time.monotonic() - start) / 60


def read_evaluations(run: Path) -> dict[str, dict[int, float]]:
    """Return accuracy in percent by language and step from a run's metrics.jsonl."""
    found: dict[str, dict[int, float]] = {language: {} for language in LANGUAGES}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        numbers = json.loads(line)
        for language in LANGUAGES:
            if f"eval/{language}/accuracy" in numbers:
                found[language][numbers["step"]] = 100 * numbers[f"eval/{language}/accuracy"]
    return found


def _plot(folders: Folders, evaluations: Mapping[str, Mapping[int, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in (folders.copsd / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for language, accuracy in evaluations.items():
        left.plot(list(accuracy), list(accuracy.values()), marker="o", label=language.capitalize())
    left.set(xlabel="COPSD step", ylabel="held-out accuracy, %", ylim=(0, 102), title="200 unseen problems each")
    left.legend(loc="lower right")
    right.plot(list(losses), list(losses.values()), color="tab:gray")
    right.set(
        xlabel="COPSD step", ylabel="KL(teacher || student), nats per token", title="Loss on the model's own answers"
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folders.plot, dpi=120)


def _show(
    folders: Folders, evaluations: Mapping[str, Mapping[int, float]], minutes: Mapping[str, float], seed: int
) -> None:
    console = Console()
    table = Table(title=f"Held-out accuracy, %, seed {seed}")
    for column in ("language", "before COPSD", "after", "change"):
        table.add_column(column, justify="left" if column == "language" else "right")
    for language, accuracy in evaluations.items():
        before, after = accuracy[min(accuracy)], accuracy[max(accuracy)]
        table.add_row(language.capitalize(), f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}")
    console.print(table)
    console.print("minutes: " + ", ".join(f"{stage} {value:.1f}" for stage, value in minutes.items()), highlight=False)
    places = {
        "problems": folders.data,
        "rollouts, with both prompts and per-token divergence": folders.copsd / "rollouts",
        "numbers": folders.copsd / "metrics.jsonl",
        "TensorBoard": folders.copsd / "tensorboard",
        "checkpoints": folders.copsd / "checkpoints",
        "model before, Hugging Face folder": folders.sft / "hf",
        "model after, Hugging Face folder": folders.copsd / "hf",
        "plot": folders.plot,
    }
    for what, where in places.items():
        console.print(f"  {what}: {where}", highlight=False, soft_wrap=True)
