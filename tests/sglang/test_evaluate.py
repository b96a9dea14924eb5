"""``copsd evaluate`` through a real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import copsd
from tiny import settings, write_config

pytestmark = pytest.mark.sglang


def test_a_server_answers_as_the_embedded_engine_does(served: str, model: Path, tmp_path: Path) -> None:
    # Greedy answers of a random model that are long enough to repeat themselves, so that there is a number to compare.
    tree = settings(tmp_path, model, rollout={"max_response_tokens": 40})
    tree["data"]["eval"] = [{**tree["data"]["train"][0], "name": "held", "count": 4}]
    config = write_config(tmp_path, tree)
    found = {}
    server = (f"sglang.urls=[{served}]", f"sglang.folder={tmp_path}")
    for engine, options in {"embedded": (), "sglang": server}.items():
        out = tmp_path / f"{engine}.json"
        done = copsd("evaluate", "accuracy", config, f"rollout.engine={engine}", *options, "--out", out)
        assert done.returncode == 0, done.stdout + done.stderr
        found[engine] = json.loads(out.read_text(encoding="utf-8"))
    assert found["embedded"]["held"]["repetition"] > 0
    assert found["sglang"] == found["embedded"]
