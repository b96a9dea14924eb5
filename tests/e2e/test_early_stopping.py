"""Held-out loss: what transformers computes in float64; training stops when it is lowest, and keeps that step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from processes import Command, copsd_each
from subset_oracle import subset_sum
from tiny import make_model, settings, write_config

from megatron_copsd.config.check import check
from megatron_copsd.config.load import load_config
from megatron_copsd.errors import UserError
from megatron_copsd.measure.evaluation import best_step, evaluations_since_best, reduced
from megatron_copsd.types import Problem, PromptPair

PATIENCE = 2


def write_rows(path: Path, words: str, sizes: dict[str, int]) -> list[dict[str, object]]:
    rows = [
        {
            "subset": subset, "group": f"{subset} {n}", "target": "SWA", "language": "SWA", "problem": f"{subset} {n}?",
            "solution": words * (1 + n % 3),
        }
        for subset, size in sizes.items()
        for n in range(size)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def test_training_stops_at_the_lowest_held_out_loss(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", "nne tano ", {"LL": 5, "TT": 3})
    held_out = write_rows(tmp_path / "held_out.jsonl", "kumi na ", {"LL": 3, "TT": 1})
    sources = {
        "train": [{"path": str(tmp_path / "train.jsonl"), "layout": "subsets", "language": "SWA"}],
        "validation": [{"path": str(tmp_path / "held_out.jsonl"), "layout": "subsets", "language": "SWA"}],
    }
    tree = settings(
        tmp_path, make_model(tmp_path / "model"), data=sources, objective={"name": "sft"}, run={"steps": 30},
        loss={"reduction": "subset_mean"}, rollout={"max_response_tokens": 100}, optimizer={"lr": 0.02},
        eval={"every": 1, "patience": PATIENCE}, checkpoint={"save_every": 100, "keep": 1},
    )  # fmt: skip
    config = write_config(tmp_path, tree)
    first, again = copsd_each([Command(("train", config)), Command(("train", config))], tmp_path / "log")
    assert first.returncode == 0, first.stderr
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    best = min(losses, key=losses.__getitem__)
    last = max(losses)
    assert last == best + PATIENCE < 30
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        f"step_{best:08d}", f"step_{last:08d}",
    ]  # fmt: skip
    assert f"held-out loss than that of step {best}, whose checkpoint is kept" in first.stdout
    assert all(line["eval/held_out-swa/loss"] == line["eval/loss"] for line in lines if "eval/loss" in line)
    # Once more: there is nothing to learn.
    assert again.returncode == 0, again.stderr
    assert "stopped early" in again.stdout
    assert f"step {last + 1}/" not in again.stdout
    (exported,) = copsd_each([Command(("export", run, "--step", best, "--out", tmp_path / "best"))], tmp_path / "log2")
    assert exported.returncode == 0, exported.stderr
    assert math.isclose(losses[best], subset_sum(tmp_path / "best", held_out), rel_tol=1e-6)


def test_reductions_of_whole_data() -> None:
    losses = [[1.0, 3.0], [5.0], [7.0, 7.0, 7.0]]
    pairs = [PromptPair(Problem("p", "SWA", "?", subset=name), (1,), (1,)) for name in ("LL", "LL", None)]
    labels = ["a", "a", "a"]
    assert reduced(losses, pairs, labels, "token_mean") == 5.0
    assert reduced(losses, pairs, labels, "sequence_mean") == 14 / 3
    assert reduced(losses, pairs, labels, "subset_mean") == 3.5 + 7.0


def test_patience() -> None:
    losses = [(2, 3.0), (4, 2.0), (6, 2.0), (8, math.inf), (10, 2.5)]
    assert [best_step(losses[:n]) for n in range(6)] == [None, 2, 4, 4, 4, 4]
    assert [evaluations_since_best(losses[:n]) for n in range(6)] == [0, 0, 0, 1, 2, 3]
    assert best_step([(1, math.inf)]) is None
    assert evaluations_since_best([(1, math.inf), (2, math.inf)]) == 2


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["eval.patience=2"], r"eval\.patience: 2: has no effect with eval\.every = 0"),
        (["eval.patience=2", "eval.every=1"], r"eval\.patience: 2: there is no held-out loss to wait for"),
        (["eval.every=1"], r"data\.eval: \[\]: evaluation is asked for and there is no held-out source"),
        (["data.validation=${data.train}", "eval.every=1", "objective.name=copsd"], r"data\.validation: .*is not what"),
    ],
)
def test_settings(tmp_path: Path, overrides: list[str], rule: str) -> None:
    config = write_config(tmp_path, settings(tmp_path, tmp_path, objective={"name": "sft"}))
    with pytest.raises(UserError, match=rule):
        check(load_config(str(config), overrides))
