"""Running copsd in processes of its own, as a user does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Seconds after which whatever a test waits for hangs, however busy the machine; pytest's own time-out is a bit longer.
PATIENCE = 1500.0
# The public files that configs/smollm2_mgsm_sw.yaml names.
_PLACES = (Path(os.environ.get("COPSD_DATA", ROOT / "data")), ROOT.parent / "shared" / "data")
PUBLIC_DATA = next((place for place in _PLACES if (place / "mgsm").is_dir()), _PLACES[0])


def copsd(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run ``copsd`` to its end with captured output; ``processes`` is --nproc of a training."""
    nproc = ["--nproc", processes] if processes > 1 else []
    return python("-m", "copsd_tools.cli", *arguments, *nproc)


@dataclass(frozen=True)
class Command:
    """A command of copsd's.

    Attributes:
        arguments: of ``copsd``.
        killed_at: what it is killed at as soon as it opens it, or a file below it.
    """

    arguments: tuple[object, ...]
    killed_at: Path | None = None


def copsd_each(commands: Sequence[Command], folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run commands one after another, each as ``copsd`` would, from one start of Python."""
    folder.mkdir(parents=True, exist_ok=True)
    plans = [
        {
            "arguments": [str(argument) for argument in command.arguments],
            "killed_at": None if command.killed_at is None else str(command.killed_at),
            **{name: str(folder / f"{number}.{name}") for name in ("out", "err", "code")},
        }
        for number, command in enumerate(commands)
    ]
    (folder / "commands.json").write_text(json.dumps(plans), encoding="utf-8")
    done = python(ROOT / "tests" / "support" / "commands_worker.py", folder / "commands.json")
    assert done.returncode == 0, done.stderr
    found = []
    for command, plan in zip(commands, plans, strict=True):
        code, out, err = (Path(plan[name]).read_text(encoding="utf-8") for name in ("code", "out", "err"))
        found.append(subprocess.CompletedProcess(command.arguments, int(code), out, err))
    return found


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` to its end with captured output."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, timeout=PATIENCE, env=environment(), cwd=ROOT, check=False,
    )  # fmt: skip


def wait_until(condition: Callable[[], object], every: float = 0.2) -> None:
    """Return when ``condition`` holds, which it must before patience ends."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every)


def environment() -> dict[str, str]:
    """Environment of a test process: one thread each, and no launcher's leftovers."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    ours = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "COPSD_DATA": str(PUBLIC_DATA)}
    return {**inherited, **ours}


def train(config: Path, *overrides: str, processes: int = 1) -> str:
    """Run a training that must succeed; returns what it printed."""
    done = copsd("train", config, *overrides, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics(run: Path) -> list[dict[str, float]]:
    """Training lines of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "loss" in line]


def has_steps(run: Path) -> bool:
    """Whether a run that goes on has written a whole line."""
    path = run / "metrics.jsonl"
    return path.is_file() and "\n" in path.read_text(encoding="utf-8")
