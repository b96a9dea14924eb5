"""Going on with a run: what is taken over from it, what from the settings, and what must not differ."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import Command, copsd_each, metrics
from safetensors.torch import load_file
from tiny import make_model, settings, write_config
from transformers import AutoConfig

SCHEDULE = ("optimizer.decay=cosine", "optimizer.warmup_steps=1")


@dataclass(frozen=True)
class Done:
    """Outcomes by name: exit code and what was printed; the folder, and whether a failed start kept the records."""

    code: dict[str, int]
    printed: dict[str, str]
    folder: Path
    kept: bool


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("continue")
    model = make_model(folder / "model")
    config = write_config(folder, settings(folder, model, run={"steps": 2}, checkpoint={"save_every": 2}))
    roped = shutil.copytree(model, folder / "roped")
    edited = json.loads((roped / "config.json").read_text(encoding="utf-8"))
    edited["rope_parameters"] = {"rope_type": "default", "rope_theta": 7.0}
    (roped / "config.json").write_text(json.dumps(edited), encoding="utf-8")
    no_server = folder / "no_server"
    no_server.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    no_server.chmod(0o755)
    here = Path(os.path.relpath(folder / "moved", Path.cwd()))
    plans: dict[str, tuple[object, ...]] = {
        "whole": ("train", config, f"run.dir={folder / 'whole'}", "run.steps=4", *SCHEDULE),
        "first": ("train", config, f"run.dir={folder / 'run'}", *SCHEDULE),
        "model": ("train", config, f"run.dir={folder / 'run'}", f"model.path={roped}", "run.steps=4"),
        "seed": ("train", config, f"run.dir={folder / 'run'}", "run.seed=9", "run.steps=4"),
        "prompts": ("train", config, f"run.dir={folder / 'run'}", "rollout.prompts_per_step=4", "run.steps=4"),
        "server": (
            "train",
            config,
            f"run.dir={folder / 'run'}",
            "run.steps=4",
            "rollout.engine=sglang",
            f"sglang.python={no_server}",
        ),
        "rest": ("train", config, f"run.dir={folder / 'run'}", "run.steps=4", *SCHEDULE, "optimizer.beta1=0.5"),
        "anew": ("train", config, f"run.dir={folder / 'run'}", "--overwrite", "run.steps=1"),
        "export": ("export", folder / "run.1", "--out", here),
    }
    # The folder that model.path names is gone when the run is exported.
    commands = [Command(arguments) for arguments in plans.values()]
    before = list(plans).index("server")
    found = copsd_each(commands[:before], folder / "first")
    left = records(folder / "run")
    found += copsd_each(commands[before : before + 1], folder / "server")
    kept = records(folder / "run") == left
    found += copsd_each(commands[before + 1 : -1], folder / "rest")
    model.rename(folder / "gone")
    found += copsd_each(commands[-1:], folder / "last")
    outcomes = dict(zip(plans, found, strict=True))
    return Done(
        {name: each.returncode for name, each in outcomes.items()},
        {name: each.stdout + each.stderr for name, each in outcomes.items()},
        folder,
        kept,
    )


def records(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in ("config.yaml", "metrics.jsonl", "format.json")}


def test_the_schedule_follows_from_settings_and_step(done: Done) -> None:
    assert (done.code["first"], done.code["rest"], done.code["whole"]) == (0, 0, 0)
    whole, parts = metrics(done.folder / "whole"), metrics(done.folder / "run.1")
    assert [line["learning_rate"] for line in parts[2:]] == [line["learning_rate"] for line in whole[2:]]
    assert parts[2]["learning_rate"] > 0


def test_what_changes_is_said(done: Done) -> None:
    assert "optimizer.beta1: 0.9 before, 0.5 from step 3" in done.printed["rest"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model", "model.path (%s/roped): rope"),
        ("seed", "run.seed: 9"),
        ("prompts", "rollout.prompts_per_step: 4"),
    ],
)
def test_what_must_not_change_is_refused(done: Done, name: str, says: str) -> None:
    assert done.code[name] == 2
    printed = done.printed[name]
    assert (says % done.folder if "%" in says else says) in printed
    assert "step_00000002" in printed
    assert "Traceback" not in printed


def test_a_run_that_can_not_begin_changes_no_record(done: Done) -> None:
    assert done.code["server"] == 2
    assert "Traceback" not in done.printed["server"]
    assert done.kept


def test_an_earlier_run_is_moved_aside(done: Done) -> None:
    assert done.code["anew"] == 0
    assert f"the earlier run is in {done.folder / 'run.1'}" in done.printed["anew"]
    assert [line["step"] for line in metrics(done.folder / "run")] == [1]
    assert [line["step"] for line in metrics(done.folder / "run.1")] == [1, 2, 3, 4]


def test_a_run_is_exported_as_the_model_it_began_with(done: Done) -> None:
    assert done.code["export"] == 0, done.printed["export"]
    moved = done.folder / "moved"
    assert (
        AutoConfig.from_pretrained(moved).rope_parameters
        == AutoConfig.from_pretrained(done.folder / "gone").rope_parameters
    )
    assert load_file(moved / "model.safetensors").keys() == load_file(done.folder / "gone" / "model.safetensors").keys()
    assert (moved / "tokenizer.json").read_bytes() == (done.folder / "gone" / "tokenizer.json").read_bytes()
