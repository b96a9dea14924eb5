"""Every objective and teacher through the real trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import copsd, metrics, train
from tiny import make_model, settings, write_config

from megatron_copsd.methods.grpo import group_advantages


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objectives")
    tree = settings(folder, make_model(folder / "model"))
    tree["data"]["eval"] = [{**tree["data"]["train"][0], "name": "held", "count": 4}]
    return write_config(folder, tree)


def test_equal_prompts_give_exactly_zero(config: Path, tmp_path: Path) -> None:
    train(
        config,
        f"run.dir={tmp_path}",
        "prompt.include_problem_en=false",
        "prompt.include_solution=false",
        "loss.divergence=jsd",
        "loss.entry_clip=0.05",
    )
    assert [(line["loss"], line["grad_norm"]) for line in metrics(tmp_path)] == [(0.0, 0.0)] * 3


def test_opsd_on_english_with_a_live_teacher(config: Path, tmp_path: Path) -> None:
    train(
        config,
        f"run.dir={tmp_path}",
        "data.train.0.language=EN",
        "teacher.weights=live",
        "loss.divergence=reverse_kl",
        "loss.reduction=sequence_mean",
        "eval.at_end=true",
    )
    lines = metrics(tmp_path)
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)
    rollouts = [json.loads(line) for line in (tmp_path / "rollouts" / "step_000001.jsonl").read_text().splitlines()]
    assert len(rollouts) == 6
    for record in rollouts:
        assert record["teacher_prompt"] != record["student_prompt"]
        assert "#### " in record["teacher_prompt"]
        assert len(record["token_losses"]) == len(record["response_ids"]) == len(record["token_log_probs"])
        assert record["weight_version"] == 0
    # sequence_mean: the loss is the mean over responses of their token means.
    means = [sum(record["token_losses"]) / len(record["token_losses"]) for record in rollouts]
    assert lines[0]["loss"] == pytest.approx(sum(means) / len(means), rel=1e-5)
    evaluations = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluations if "eval/held/accuracy" in line] == [3]


def test_opsd_is_copsd_without_the_english_problem(config: Path, tmp_path: Path) -> None:
    def run(name: str, *overrides: str) -> tuple[list[dict[str, float]], list[str]]:
        folder = tmp_path / name
        train(config, f"run.dir={folder}", "run.steps=2", *overrides)
        text = (folder / "rollouts" / "step_000001.jsonl").read_text(encoding="utf-8")
        return metrics(folder), [json.loads(line)["teacher_prompt"] for line in text.splitlines()]

    lines, teacher = run("opsd", "objective.name=opsd")
    same, same_teacher = run("copsd", "prompt.include_problem_en=false")
    assert teacher == same_teacher
    assert all("Problem: " not in prompt and "#### " in prompt for prompt in teacher)
    assert [line["loss"] for line in lines] == [line["loss"] for line in same]
    done = copsd("train", config, "--check", "objective.name=opsd", "prompt.include_problem_en=true")
    assert done.returncode == 2
    assert "prompt.include_problem_en" in done.stderr


def test_grpo(config: Path, tmp_path: Path) -> None:
    train(config, f"run.dir={tmp_path}", "objective.name=grpo", "rollout.samples_per_prompt=4", "run.steps=2")
    rollouts = [json.loads(line) for line in (tmp_path / "rollouts" / "step_000001.jsonl").read_text().splitlines()]
    assert len(rollouts) == 24
    assert {record["reward"] for record in rollouts} <= {0.0, 1.0}
    assert len({record["problem_id"] for record in rollouts}) == 6
    assert all("reward" in line for line in metrics(tmp_path))


def test_sft_learns_the_solutions(config: Path, tmp_path: Path) -> None:
    train(
        config,
        f"run.dir={tmp_path}",
        "objective.name=sft",
        "run.steps=30",
        "optimizer.lr=0.01",
        "rollout.max_response_tokens=40",
    )
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert losses[-1] < 0.5 * losses[0]
    assert not (tmp_path / "rollouts").exists()


def test_exported_model_scores_as_in_training(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config, f"run.dir={run}", "objective.name=sft", "run.steps=60", "optimizer.lr=0.01", "eval.at_end=true",
          "rollout.max_response_tokens=40", processes=2)  # fmt: skip
    assert copsd("export", run, "--out", tmp_path / "hf").returncode == 0
    out = tmp_path / "numbers.json"
    done = copsd(
        "evaluate", "accuracy", config, "rollout.max_response_tokens=40", "--model", tmp_path / "hf", "--out", out
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    in_training = {k: v for line in lines for k, v in line.items() if k.startswith("eval/held/")}
    assert {f"eval/held/{k}": v for k, v in json.loads(out.read_text())["held"].items()} == in_training


def test_advantages() -> None:
    advantages = group_advantages([1, 0, 0, 1, 1, 1, 1, 1], 4)
    assert advantages[:4] == pytest.approx([1, -1, -1, 1], abs=1e-5)
    assert advantages[4:] == [0, 0, 0, 0]
