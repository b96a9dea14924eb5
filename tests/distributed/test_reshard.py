"""A checkpoint written under one layout continues under another as if nothing had happened."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from layouts import TOLERANCE, LayoutCase, compare, run_case
from tiny import make_model, settings, write_config

TP2, PP2, VPP2 = "parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"
SINGLE = LayoutCase("1 process", 1)
PAIRS = (
    # The vocabulary is padded to a multiple of 64 rows a tensor-parallel rank: its shape changes with them.
    (LayoutCase("TP2", 2, (TP2,)), LayoutCase("PP2 VPP2", 2, (PP2, VPP2)), "ema", False),
    (SINGLE, LayoutCase("TP2", 2, (TP2,)), "frozen", True),
    (LayoutCase("TP2", 2, (TP2,)), LayoutCase("PP2", 2, (PP2,)), "frozen", True),
    (LayoutCase("PP2", 2, (PP2,)), LayoutCase("DP2", 2), "ema", True),
    (LayoutCase("DP2", 2), LayoutCase("TP2 SP", 2, (TP2, "parallel.sequence=true")), "frozen", True),
    (LayoutCase("TP2 PP2", 4, (TP2, PP2)), SINGLE, "ema", True),
    (
        LayoutCase("PP2 VPP2", 2, (PP2, VPP2)),
        LayoutCase("PP2, 1+3", 2, (PP2, "parallel.first_stage_layers=1")),
        "ema",
        True,
    ),
)


@pytest.mark.parametrize(
    ("before", "after", "teacher"),
    [
        pytest.param(a, b, teacher, id=f"{a.name} to {b.name}, {teacher}", marks=[pytest.mark.slow] if slow else [])
        for a, b, teacher, slow in PAIRS
    ],
)
def test_resume_under_another_layout(tmp_path: Path, before: LayoutCase, after: LayoutCase, teacher: str) -> None:
    model = make_model(tmp_path / "model", num_hidden_layers=4)
    sections = {
        "run": {"steps": 4},
        "checkpoint": {"save_every": 2},
        "optimizer": {"eps": 1e-6, "warmup_steps": 2, "decay": "cosine"},
        "teacher": {"weights": teacher, **({"ema_decay": 0.8} if teacher == "ema" else {})},
    }
    config = write_config(tmp_path, settings(tmp_path, model, **sections))
    whole = run_case(before, config, tmp_path / "whole")
    step = Path("checkpoints") / "step_00000002"
    shutil.copytree(tmp_path / "whole" / step, tmp_path / "resumed" / step)
    resumed = run_case(after, config, tmp_path / "resumed")
    assert [line["step"] for line in resumed.steps] == [3, 4]
    differences = compare(resumed, dataclasses.replace(whole, steps=whole.steps[2:]))
    print(differences.row(f"{before.name} to {after.name}, {teacher}"))
    assert max(differences.loss, differences.grad_norm, differences.weights) < TOLERANCE
