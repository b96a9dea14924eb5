"""``copsd evaluate`` through a real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import Command, copsd_each
from tiny import settings, write_config

pytestmark = pytest.mark.sglang


def test_a_server_answers_as_the_embedded_engine_does(served: str, model: Path, tmp_path: Path) -> None:
    """Held-out problems that the model has learned, so that there are right answers to compare."""
    lengths = {"max_response_tokens": 40, "prompts_per_step": 12}
    tree = settings(tmp_path, model, rollout=lengths, objective={"name": "sft"})
    tree["data"]["eval"] = [{**tree["data"]["train"][0], "name": "held"}]
    config = write_config(tmp_path, tree)
    hf, embedded, served_by = (tmp_path / name for name in ("hf", "embedded.json", "sglang.json"))
    accuracy = ("evaluate", "accuracy", config)
    server = ("rollout.engine=sglang", f"sglang.urls=[{served}]", f"sglang.folder={tmp_path}")
    commands = (
        ("train", config, "run.steps=60", "optimizer.lr=0.01"),
        ("export", tmp_path / "run", "--out", hf),
        (*accuracy, "--model", hf, "--out", embedded),
        (*accuracy, *server, "--model", hf, "--out", served_by),
    )
    for done in copsd_each([Command(command) for command in commands], tmp_path / "said"):
        assert done.returncode == 0, done.stdout + done.stderr
    expected, found = (json.loads(path.read_text(encoding="utf-8")) for path in (embedded, served_by))
    assert expected["held"]["accuracy"] > 0
    assert found == expected
