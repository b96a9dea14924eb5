"""A loss that is not finite: the step is not applied, its batch is kept, and so is what was saved before.

The model's last norm is so large that its hidden states overflow; all of its weights are finite.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from processes import Command, copsd, copsd_each
from safetensors.torch import load_file, save_file
from tiny import make_model, settings, write_config

NORM = "model.norm.weight"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, subprocess.CompletedProcess[str]]]:
    """The run folder and the outcome of each training of the module, from one start of Python."""
    folder = tmp_path_factory.mktemp("nonfinite")
    model = make_model(folder / "model")
    config = write_config(folder, settings(folder, model, run={"steps": 3}, checkpoint={"save_every": 1}))
    overflowing = shutil.copytree(model, folder / "overflowing")
    tensors = load_file(overflowing / WEIGHTS)
    tensors[NORM] = torch.full_like(tensors[NORM], 3e38)
    save_file(tensors, overflowing / WEIGHTS, metadata={"format": "pt"})
    overrides = {
        "refused": (f"model.path={overflowing}",),
        "passed over": (f"model.path={overflowing}", "optimizer.skip_nonfinite=3"),
        "sft": (f"model.path={overflowing}", "objective.name=sft", "rollout.max_response_tokens=256"),
    }
    commands = [Command(("train", config, f"run.dir={folder / name}", *each)) for name, each in overrides.items()]
    done = copsd_each(commands, folder / "commands")
    return {name: (folder / name, each) for name, each in zip(overrides, done, strict=True)}


def lines(run: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("name", "fault"), [("refused", "the teacher's hidden states hold NaN"), ("sft", "the loss is nan")]
)
def test_the_run_stops(runs: dict[str, tuple[Path, subprocess.CompletedProcess[str]]], name: str, fault: str) -> None:
    run, done = runs[name]
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"optimizer.skip_nonfinite: 0: {fault}" in done.stderr
    assert not (run / "checkpoints").exists()
    (line,) = lines(run)
    assert (line["step"], line["loss"], line["skipped"]) == (1, None, 1)
    batch = run / "bad_steps" / "step_000001.jsonl"
    assert str(batch) in done.stderr
    rows = [json.loads(row) for row in batch.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 6
    assert all(row["response_ids"] and None in row["token_losses"] for row in rows)


def test_allowed_steps_are_passed_over(runs: dict[str, tuple[Path, subprocess.CompletedProcess[str]]]) -> None:
    run, done = runs["passed over"]
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("passed over: the teacher's hidden states") == 3
    assert [(line["loss"], line["grad_norm"], line["skipped"]) for line in lines(run)] == [(None, None, 1)] * 3
    assert len(list((run / "bad_steps").iterdir())) == 3
    out = run.parent / "exported"
    assert copsd("export", run, "--out", out).returncode == 0
    before, after = load_file(run.parent / "overflowing" / WEIGHTS), load_file(out / WEIGHTS)
    assert all(torch.equal(before[name], after[name]) for name in before)
