"""Recomputed activations are not held: the numbers are those of test_layouts.py, the memory is this test's."""

from __future__ import annotations

import re
from pathlib import Path

from processes import ROOT, python
from tiny import make_model, settings, write_config


def test_less_is_held(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", num_hidden_layers=6, intermediate_size=256)
    config = write_config(tmp_path, settings(tmp_path, model, optimizer={"micro_batch_size": 6}))
    done = python(ROOT / "tests" / "support" / "recompute_worker.py", config)
    assert done.returncode == 0, done.stdout + done.stderr
    held = {name: int(size) for name, size in re.findall(r"(none|selective|full)=(\d+)", done.stdout)}
    assert held["selective"] < 0.75 * held["none"]
    assert held["full"] < 0.5 * held["selective"]
