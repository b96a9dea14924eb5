"""Every way to end a run leaves no process behind, says what is kept, and can be continued bit for bit."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from endings import Training, one_line
from processes import PATIENCE, ROOT, environment, metrics, train, wait_until
from tiny import make_model, settings, write_config

STEPS = 8
MANY_STEPS = 60
Numbers = list[tuple[float, float, float]]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("endings")
    sections = {"run": {"steps": STEPS}, "checkpoint": {"save_every": 2}}
    return write_config(folder, settings(folder, make_model(folder / "model"), **sections))


def numbers(run: Path) -> Numbers:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(run)]


class References:
    """Runs that were not stopped, by number of processes and steps."""

    def __init__(self, config: Path, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._found: dict[tuple[int, int], Numbers] = {}

    def numbers(self, processes: int, steps: int) -> Numbers:
        if (processes, steps) not in self._found:
            run = self._folder / f"whole_{processes}_{steps}"
            train(self._config, f"run.dir={run}", f"run.steps={steps}", processes=processes)
            self._found[processes, steps] = numbers(run)
        return self._found[processes, steps]


@pytest.fixture(scope="module")
def references(config: Path, tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(config, tmp_path_factory.mktemp("references"))


@pytest.mark.parametrize(
    ("processes", "number", "to_worker"),
    [
        (1, signal.SIGTERM, False),
        (2, signal.SIGINT, False),
        pytest.param(2, signal.SIGHUP, True, marks=pytest.mark.slow),
        (2, signal.SIGKILL, False),
        pytest.param(2, signal.SIGKILL, True, marks=pytest.mark.slow),
    ],
    ids=["1-TERM", "2-INT", "2-HUP-worker", "2-KILL", "2-KILL-worker"],
)
def test_ended_and_continued(
    config: Path, references: References, tmp_path: Path, processes: int, number: int, to_worker: bool
) -> None:
    run = tmp_path / "run"
    first = Training(config, run, processes=processes, log=tmp_path / "first")
    assert first.wait_for(3), first.text()
    code = first.end(number, first.workers()[-1] if to_worker else None)
    if number == signal.SIGKILL and to_worker:
        assert code == 1
        assert "rank 1 failed first (exit code -9)" in first.text()
    elif number == signal.SIGKILL:
        assert code == -number
    else:
        assert code == 128 + number, first.text()
        name = signal.Signals(number).name
        kept = one_line(first.text(), [f"copsd train: stopped by {name}", "is kept"])
        assert f"step_{len(numbers(run)):08d} is kept" in kept
        assert "Traceback" not in first.text()
    train(config, f"run.dir={run}", processes=processes)
    assert numbers(run) == references.numbers(processes, STEPS)


def test_before_the_first_step_there_is_nothing_to_finish(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    training = Training(config, run, log=tmp_path / "log")
    wait_until((run / "run.lock").exists, every=0.02)  # held from then on, and signals are taken
    assert training.end(signal.SIGHUP) in (128 + signal.SIGHUP, 0)
    assert "Traceback" not in training.text()


def test_a_second_signal_ends_at_once(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    training = Training(config, run, "rollout.max_response_tokens=1500", log=tmp_path / "log")
    assert training.wait_for(1)
    training.process.send_signal(signal.SIGINT)
    said = "a second signal ends it at once"
    wait_until(lambda: said in training.text() or training.process.poll() is not None, every=0.01)
    assert said in training.text()
    assert training.end(signal.SIGINT) == -signal.SIGINT
    assert not list(run.glob("checkpoints/step_*"))


def test_without_saving_a_signal_ends_at_once(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    training = Training(
        config, run, "checkpoint.save_on_signal=false", "rollout.max_response_tokens=1500", log=tmp_path / "log"
    )
    assert training.wait_for(1)
    assert training.end(signal.SIGTERM) == 128 + signal.SIGTERM
    assert "no checkpoint was written yet" in training.text()


def test_killed_while_it_saves(config: Path, tmp_path: Path) -> None:
    """The writers that Megatron forks end with the trainer."""
    log = tmp_path / "log"
    worker = [sys.executable, ROOT / "tests" / "support" / "killed_worker.py", ".distcp", "train", config]
    mark = {"COPSD_TEST_SAVE": str(tmp_path)}
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [*map(str, worker), f"run.dir={tmp_path / 'run'}"],
            stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env={**environment(), **mark}, timeout=PATIENCE,
            check=False,
        )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, log.read_text(encoding="utf-8")

    def left() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().items() >= mark.items() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, FileNotFoundError):
                continue
        return found

    wait_until(lambda: not left(), every=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize(("processes", "to_worker"), [(1, False), (2, False), (2, True)])
def test_ten_random_moments(
    config: Path, references: References, tmp_path: Path, processes: int, to_worker: bool, number: int
) -> None:
    run = tmp_path / "run"
    chance = random.Random(f"{processes} {to_worker} {number}")
    for moment in range(10):
        training = Training(config, run, f"run.steps={MANY_STEPS}", processes=processes, log=tmp_path / f"{moment}")
        running = training.wait_for(training.lines() + 1 if chance.random() < 0.8 else 0)
        time.sleep(chance.uniform(0, 1.0))  # somewhere in what follows: that is the point
        whom = chance.choice(training.workers()) if to_worker and running else None
        code = training.end(number, whom)
        if to_worker and number == signal.SIGKILL:
            assert code in (0, 1, -number), training.text()
        else:
            assert code in (0, 128 + number, -number), training.text()
        assert "Traceback" not in training.text() or number == signal.SIGKILL
    train(config, f"run.dir={run}", f"run.steps={MANY_STEPS}", processes=processes)
    assert numbers(run) == references.numbers(processes, MANY_STEPS)
