"""Stopping anywhere and resuming gives the losses of the run that was not stopped, bit for bit.

All runs come from two starts of Python, which differ in what two processes of different times do: the order of sets.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from layouts import selected
from processes import Command, copsd_each, metrics
from tiny import make_model, settings, write_config

CHECKPOINTS = Path("checkpoints")
THIRD, LAST, PARTIAL = "step_00000003", "step_00000006", "step_00000006.partial"


@dataclass(frozen=True)
class Case:
    """A run under some settings that is killed at a file, or, without one, set back from its end to its third step."""

    overrides: tuple[str, ...] = ()
    killed_at: Path | None = None


LORA_EMA = ("lora.rank=4", "teacher.weights=ema", "teacher.ema_decay=0.9", "model.dtype=bfloat16", "lora.dtype=float32")
CASES = {
    # Step 4 is lost with the process; its line must not appear twice.
    "killed between saves": Case(killed_at=Path("rollouts") / "step_000005.jsonl.partial"),
    "killed during a save": Case(killed_at=CHECKPOINTS / PARTIAL),
    "ema-bfloat16": Case(("teacher.weights=ema", "teacher.ema_decay=0.9", "model.dtype=bfloat16")),
    "plain-optimizer": Case(("optimizer.distributed=false",)),
    "lora": Case(("lora.rank=4", "optimizer.lr=0.01")),
    "lora-ema-bfloat16": Case(LORA_EMA),
}
Numbers = list[tuple[float, float, float]]


@dataclass(frozen=True)
class Resumed:
    """A run that was stopped and went on.

    Attributes:
        run: folder.
        stopped: exit code of its first part.
        left: names of the checkpoints between the two.
        printed: by its second part.
        expected: numbers of the run that was not stopped.
    """

    run: Path
    stopped: int
    left: list[str]
    printed: str
    expected: Numbers

    def assert_same(self) -> None:
        assert len(self.expected) == 6
        assert numbers(self.run) == self.expected


def numbers(run: Path) -> Numbers:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(run)]


def train_each(config: Path, runs: dict[Path, Case], folder: Path) -> dict[Path, tuple[int, str]]:
    """Train into each folder, killed or not; returns exit codes and what was printed."""
    commands = [
        Command(
            ("train", config, f"run.dir={run}", "checkpoint.keep=3", *case.overrides),
            None if case.killed_at is None else run / case.killed_at,
        )
        for run, case in runs.items()
    ]
    done = copsd_each(commands, folder)
    return {run: (each.returncode, each.stdout + each.stderr) for run, each in zip(runs, done, strict=True)}


@pytest.fixture(scope="module")
def resumed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Resumed]:
    """The cases of the module's tests that are about to run."""
    folder = tmp_path_factory.mktemp("resume")
    sections = {
        "run": {"steps": 6},
        "checkpoint": {"save_every": 3},
        "optimizer": {"warmup_steps": 2, "decay": "cosine"},
    }
    config = write_config(folder, settings(folder, make_model(folder / "model"), **sections))
    names: list[str] = selected(request)
    runs = {folder / name: CASES[name] for name in names}
    whole = folder / "whole"
    first = train_each(config, {whole: Case(), **runs}, folder / "first")
    expected = {run: numbers(whole if case.killed_at else run) for run, case in runs.items()}
    for run, case in runs.items():
        if case.killed_at is None:
            (run / CHECKPOINTS / LAST).rename(run / "aside")
    left = {run: sorted(path.name for path in (run / CHECKPOINTS).iterdir()) for run in runs}
    again = {run: Case(case.overrides) for run, case in runs.items()}
    second = train_each(config, again, folder / "second")
    return {
        name: Resumed(run, first[run][0], left[run], second[run][1], expected[run])
        for name, run in zip(names, runs, strict=True)
    }


@pytest.mark.parametrize("case", ["killed between saves"])
def test_killed_between_saves(resumed: dict[str, Resumed], case: str) -> None:
    found = resumed[case]
    assert (found.stopped, found.left) == (-signal.SIGKILL, [THIRD])
    assert "3 steps done" in found.printed
    found.assert_same()


@pytest.mark.parametrize("case", ["killed during a save"])
def test_killed_during_a_save(resumed: dict[str, Resumed], case: str) -> None:
    found = resumed[case]
    assert (found.stopped, found.left) == (-signal.SIGKILL, [THIRD, PARTIAL])
    found.assert_same()
    assert not (found.run / CHECKPOINTS / PARTIAL).exists()


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("ema-bfloat16", marks=pytest.mark.slow),
        "plain-optimizer",
        pytest.param("lora", marks=pytest.mark.slow),
        "lora-ema-bfloat16",
    ],
)
def test_other_state(resumed: dict[str, Resumed], case: str) -> None:
    found = resumed[case]
    assert (found.stopped, found.left) == (0, [THIRD])
    assert "3 steps done" in found.printed
    found.assert_same()
