"""Every objective and teacher through the real trainer."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from processes import Command, copsd_each, metrics, train
from tiny import make_model, settings, write_config

from megatron_copsd.methods.grpo import group_advantages


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objectives")
    tree = settings(folder, make_model(folder / "model"))
    tree["data"]["eval"] = [{**tree["data"]["train"][0], "name": "held", "count": 4}]
    return write_config(folder, tree)


RUNS = {
    "equal prompts": (
        "prompt.include_problem_en=false",
        "prompt.include_solution=false",
        "loss.divergence=jsd",
        "loss.entry_clip=0.05",
    ),
    "English, live teacher": (
        "data.train.0.language=EN",
        "teacher.weights=live",
        "loss.divergence=reverse_kl",
        "loss.reduction=sequence_mean",
        "eval.at_end=true",
    ),
    "opsd": ("objective.name=opsd", "run.steps=2"),
    "copsd without the English problem": ("prompt.include_problem_en=false", "run.steps=2"),
    "opsd with the English problem": ("objective.name=opsd", "prompt.include_problem_en=true", "--check"),
    "sampled token": ("objective.name=sampled_token",),
    "sampled token, equal prompts": (
        "objective.name=sampled_token",
        "prompt.include_problem_en=false",
        "prompt.include_solution=false",
        "run.steps=1",
    ),
    "grpo": ("objective.name=grpo", "rollout.samples_per_prompt=4", "run.steps=2"),
    "grpo, ratio": (
        "objective.name=grpo",
        "rollout.samples_per_prompt=4",
        "run.steps=2",
        "policy.ratio=sampled",
        "policy.clip_high=0.28",
        "optimizer.packing=true",
    ),
    "sft": ("objective.name=sft", "run.steps=30", "optimizer.lr=0.01", "rollout.max_response_tokens=40"),
}


@dataclass(frozen=True)
class Trained:
    """A training that has ended, its folder, and what it said."""

    folder: Path
    done: subprocess.CompletedProcess[str]

    @property
    def lines(self) -> list[dict[str, float]]:
        assert self.done.returncode == 0, self.done.stdout + self.done.stderr
        return metrics(self.folder)

    def rollouts(self) -> list[dict[str, Any]]:
        """Those of the first step."""
        assert self.done.returncode == 0, self.done.stdout + self.done.stderr
        text = (self.folder / "rollouts" / "step_000001.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """All of the runs."""
    folder = tmp_path_factory.mktemp("runs")
    commands = [Command(("train", config, f"run.dir={folder / name}", *overrides)) for name, overrides in RUNS.items()]
    found = zip(RUNS, copsd_each(commands, folder / "said"), strict=True)
    return {name: Trained(folder / name, done) for name, done in found}


def test_equal_prompts_give_exactly_zero(trained: dict[str, Trained]) -> None:
    lines = trained["equal prompts"].lines
    assert [(line["loss"], line["grad_norm"]) for line in lines] == [(0.0, 0.0)] * 3


def test_opsd_on_english_with_a_live_teacher(trained: dict[str, Trained]) -> None:
    run = trained["English, live teacher"]
    lines, rollouts = run.lines, run.rollouts()
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)
    assert len(rollouts) == 6
    for record in rollouts:
        assert record["teacher_prompt"] != record["student_prompt"]
        assert "#### " in record["teacher_prompt"]
        assert len(record["token_losses"]) == len(record["response_ids"]) == len(record["token_log_probs"])
        assert record["weight_version"] == 0
    # sequence_mean: the loss is the mean over responses of their token means.
    means = [sum(record["token_losses"]) / len(record["token_losses"]) for record in rollouts]
    assert lines[0]["loss"] == pytest.approx(sum(means) / len(means), rel=1e-5)
    evaluations = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluations if "eval/held/accuracy" in line] == [3]


def test_opsd_is_copsd_without_the_english_problem(trained: dict[str, Trained]) -> None:
    opsd, same = trained["opsd"], trained["copsd without the English problem"]
    teacher = [record["teacher_prompt"] for record in opsd.rollouts()]
    assert teacher == [record["teacher_prompt"] for record in same.rollouts()]
    assert all("Problem: " not in prompt and "#### " in prompt for prompt in teacher)
    assert [line["loss"] for line in opsd.lines] == [line["loss"] for line in same.lines]
    refused = trained["opsd with the English problem"].done
    assert refused.returncode == 2
    assert "prompt.include_problem_en" in refused.stderr


def test_sampled_token(trained: dict[str, Trained]) -> None:
    run = trained["sampled token"]
    assert all(line["grad_norm"] > 0 for line in run.lines)
    for line in run.lines:
        assert line["loss"] == pytest.approx(line["divergence"], rel=1e-5)
    losses = [loss for record in run.rollouts() for loss in record["token_losses"]]
    assert run.lines[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    (same,) = trained["sampled token, equal prompts"].lines
    assert same["loss"] == pytest.approx(0, abs=1e-6)
    assert same["grad_norm"] == pytest.approx(0, abs=1e-5)


def test_grpo(trained: dict[str, Trained]) -> None:
    rollouts = trained["grpo"].rollouts()
    assert len(rollouts) == 24
    assert {record["reward"] for record in rollouts} <= {0.0, 1.0}
    assert len({record["problem_id"] for record in rollouts}) == 6
    assert all("reward" in line for line in trained["grpo"].lines)
    assert all(record["teacher_prompt"] == record["student_prompt"] for record in rollouts)


def test_the_ratio_of_fresh_rollouts_is_one(trained: dict[str, Trained]) -> None:
    """The embedded engine samples from the weights that are trained: both forms of the objective are one."""
    for plain, ratio in zip(trained["grpo"].lines, trained["grpo, ratio"].lines, strict=True):
        assert ratio["importance_ratio"] == pytest.approx(1, abs=1e-4)
        assert ratio["clipped_ratio_share"] == 0
        assert ratio["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3, abs=1e-7)
        assert ratio["loss"] == pytest.approx(plain["loss"], abs=1e-4)


def test_sft_learns_the_solutions(trained: dict[str, Trained]) -> None:
    losses = [line["loss"] for line in trained["sft"].lines]
    assert losses[-1] < 0.5 * losses[0]
    assert not (trained["sft"].folder / "rollouts").exists()


def test_exported_model_scores_as_in_training(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config, f"run.dir={run}", "objective.name=sft", "run.steps=60", "optimizer.lr=0.01", "eval.at_end=true",
          "rollout.max_response_tokens=40", processes=2)  # fmt: skip
    hf, out = tmp_path / "hf", tmp_path / "numbers.json"
    accuracy = ("evaluate", "accuracy", config, "rollout.max_response_tokens=40", "--model", hf, "--out", out)
    for done in copsd_each([Command(("export", run, "--out", hf)), Command(accuracy)], tmp_path / "said"):
        assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    in_training = {k: v for line in lines for k, v in line.items() if k.startswith("eval/held/")}
    assert {f"eval/held/{k}": v for k, v in json.loads(out.read_text())["held"].items()} == in_training


def test_advantages() -> None:
    advantages = group_advantages([1, 0, 0, 1, 1, 1, 1, 1], 4)
    assert advantages[:4] == pytest.approx([0.75**0.5, -(0.75**0.5), -(0.75**0.5), 0.75**0.5], abs=1e-5)
    assert advantages[4:] == [0, 0, 0, 0]
    assert group_advantages([1, 0, 0, 1, 1, 1, 1, 0], 4, "centered") == [0.5, -0.5, -0.5, 0.5, 0.25, 0.25, 0.25, -0.75]
    assert group_advantages([1, 0], 2, "reward") == [1, 0]
