"""No step, teacher and student passes and loss included, ever makes a tensor of R * V elements."""

from __future__ import annotations

import re
from pathlib import Path

from processes import ROOT, python
from tiny import make_model, settings, write_config


def test_no_allocation_of_rows_times_vocabulary(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", vocab_size=20000)
    rollout = {"prompts_per_step": 32, "max_response_tokens": 40}
    tree = settings(tmp_path, model, rollout=rollout, loss={"scratch_mb": 4.0}, optimizer={"micro_batch_size": 32})
    done = python(ROOT / "tests" / "support" / "step_memory_worker.py", write_config(tmp_path, tree))
    assert done.returncode == 0, done.stderr
    numbers = {name: int(value) for name, value in re.findall(r"(rows|vocab|weight|largest)=(\d+)", done.stdout)}
    dense = numbers["rows"] * numbers["vocab"]
    assert dense > 10 * numbers["weight"], "the test must be able to tell logits from the weight's gradient"
    # What is largest is the output weight's gradient or the scratch, never the logits of the batch or a part of them.
    assert numbers["largest"] <= max(2 * numbers["weight"], 4 * 2**20 // 4), done.stdout
