"""``copsd evaluate`` through a real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import copsd, train
from tiny import settings, write_config

pytestmark = pytest.mark.sglang


def test_a_server_answers_as_the_embedded_engine_does(served: str, model: Path, tmp_path: Path) -> None:
    """Held-out problems that the model has learned, so that there are right answers to compare."""
    lengths = {"max_response_tokens": 40, "prompts_per_step": 12}
    tree = settings(tmp_path, model, rollout=lengths, objective={"name": "sft"})
    tree["data"]["eval"] = [{**tree["data"]["train"][0], "name": "held"}]
    config = write_config(tmp_path, tree)
    train(config, "run.steps=60", "optimizer.lr=0.01")
    assert copsd("export", tmp_path / "run", "--out", tmp_path / "hf").returncode == 0
    found = {}
    server = (f"sglang.urls=[{served}]", f"sglang.folder={tmp_path}")
    for engine, options in {"embedded": (), "sglang": server}.items():
        out = tmp_path / f"{engine}.json"
        command = ("evaluate", "accuracy", config, f"rollout.engine={engine}", *options)
        done = copsd(*command, "--model", tmp_path / "hf", "--out", out)
        assert done.returncode == 0, done.stdout + done.stderr
        found[engine] = json.loads(out.read_text(encoding="utf-8"))
    assert found["embedded"]["held"]["accuracy"] > 0
    assert found["sglang"] == found["embedded"]
