"""Stopping anywhere and resuming gives the losses of the run that was not stopped, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import ROOT, environment, metrics, train
from tiny import make_model, settings, write_config

STEPS = 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("resume")
    model = make_model(folder / "model")
    sections = {
        "run": {"steps": STEPS},
        "checkpoint": {"save_every": 3},
        "optimizer": {"warmup_steps": 2, "decay": "cosine"},
    }
    config = write_config(folder, settings(folder, model, **sections))
    train(config, f"run.dir={folder / 'whole'}")
    return config, metrics(folder / "whole")


def kill_when(config: Path, run: Path, condition: Callable[[], bool]) -> None:
    command = [sys.executable, "-m", "copsd_tools.cli", "train", str(config), f"run.dir={run}"]
    process = subprocess.Popen(
        command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 240
        while not condition():
            assert process.poll() is None, process.stdout.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def numbers(lines: list[dict]) -> list[tuple[float, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def test_kill_between_saves(whole: tuple[Path, list[dict]], tmp_path: Path) -> None:
    config, expected = whole
    run = tmp_path / "run"
    # Step 4 is lost with the process; its line must not appear twice.
    kill_when(config, run, lambda: (run / "rollouts" / "step_000004.jsonl").is_file())
    assert (run / "checkpoints" / "step_00000003").is_dir()
    output = train(config, f"run.dir={run}")
    assert "3 steps done" in output
    assert numbers(metrics(run)) == numbers(expected)


def test_kill_during_a_save(whole: tuple[Path, list[dict]], tmp_path: Path) -> None:
    config, expected = whole
    run = tmp_path / "run"
    partial = run / "checkpoints" / "step_00000006.partial"
    kill_when(config, run, lambda: partial.is_dir())
    assert partial.is_dir()
    assert [p.name for p in sorted((run / "checkpoints").glob("step_????????"))] == ["step_00000003"]
    train(config, f"run.dir={run}")
    assert numbers(metrics(run)) == numbers(expected)
    assert not partial.exists()


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("teacher.weights=ema", "teacher.ema_decay=0.9", "model.dtype=bfloat16"), marks=pytest.mark.slow),
        ("optimizer.distributed=false",),
        pytest.param(("lora.rank=4", "optimizer.lr=0.01"), marks=pytest.mark.slow),
        ("lora.rank=4", "teacher.weights=ema", "teacher.ema_decay=0.9", "model.dtype=bfloat16", "lora.dtype=float32"),
    ],
    ids=["ema-bfloat16", "plain-optimizer", "lora", "lora-ema-bfloat16"],
)
def test_other_state(whole: tuple[Path, list[dict]], tmp_path: Path, overrides: tuple[str, ...]) -> None:
    config, _ = whole
    run = tmp_path / "run"
    train(config, f"run.dir={run}", "checkpoint.keep=3", *overrides)
    expected = numbers(metrics(run))
    (run / "checkpoints" / "step_00000006").rename(run / "aside")
    train(config, f"run.dir={run}", *overrides)
    assert numbers(metrics(run)) == expected
