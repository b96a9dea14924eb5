"""Where the demonstration writes, and the stages that it runs, each once."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from copsd_tools.command_line.arguments import override
from copsd_tools.command_line.checkout import ROOT
from copsd_tools.command_line.stages import Words, run_command

CONFIGS = ROOT / "configs"


@dataclass(frozen=True)
class Folders:
    """What the demonstration makes, below one folder."""

    out: Path

    @property
    def data(self) -> Path:
        return self.out / "data"

    @property
    def sft(self) -> Path:
        return self.out / "sft"

    @property
    def base(self) -> Path:
        """The model that stage 1 has trained, as a Hugging Face folder."""
        return self.sft / "hf"

    @property
    def copsd(self) -> Path:
        return self.out / "copsd"

    @property
    def plot(self) -> Path:
        return self.out / "demo.png"

    @property
    def names(self) -> set[str]:
        """What stands in the folder when all is made."""
        return {part.name for part in (self.data, self.sft, self.copsd, self.plot)}


def make_base(folders: Folders, seed: int) -> dict[str, float]:
    """Make the problems and train the model that all methods begin with; returns minutes by stage."""
    settings = model_settings(folders, folders.sft, folders.data / "model", seed)
    settings += source_paths(folders, "train", ("en", "en", "sw", "sw"))
    return {
        "data": run_stage(folders.data / "model", ["demo-data", "--out", folders.data, "--seed", seed]),
        "1: sft": run_stage(
            folders.base,
            ["train", CONFIGS / "demo_sft.yaml", *settings, *processes()],
            ["export", folders.sft, "--out", folders.base],
        ),
    }


def model_settings(folders: Folders, run: Path, model: Path, seed: int) -> list[str]:
    """Return what every run of the demonstration sets: its folder, seed, model, and the held-out problems."""
    return [
        override("run.dir", str(run)),
        f"run.seed={seed}",
        override("model.path", str(model)),
        *source_paths(folders, "eval", ("sw", "en")),
    ]


def source_paths(folders: Folders, section: str, languages: Sequence[str]) -> list[str]:
    """Return the settings of the files of sources, given their languages."""
    prefix: Mapping[str, str] = {"train": "train", "eval": "heldout"}
    return [
        override(f"data.{section}.{i}.path", f"{folders.data}/{prefix[section]}_{language}.jsonl")
        for i, language in enumerate(languages)
    ]


def processes() -> list[str]:
    """Two replicas where there are two cores: matrices this small leave a second thread idle."""
    return ["--nproc", "2"] if (os.cpu_count() or 1) >= 2 else []


def run_stage(product: Path, *commands: Words) -> float:
    """Run commands one after the other unless their product is there; returns minutes."""
    if product.exists():
        print(f"{product} is there already; --fresh starts over", flush=True)
        return 0.0
    start = time.monotonic()
    for command in commands:
        run_command(command)
    return (time.monotonic() - start) / 60
