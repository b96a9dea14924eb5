"""``copsd bench packing`` on sampled responses of a tiny model."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from processes import copsd
from tiny import make_model, settings, write_config


def test_packing_has_no_padding_and_the_same_loss(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    # Many stop ids, so that responses end at all lengths.
    rollout = {"prompts_per_step": 8, "max_response_tokens": 60, "stop_token_ids": list(range(4, 20))}
    tree = settings(tmp_path, model, rollout=rollout, optimizer={"micro_batch_size": 4})
    out = tmp_path / "packing.csv"
    done = copsd("bench", "packing", write_config(tmp_path, tree), "--repeats", "1", "--csv", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "packed, by tokens" in done.stdout
    with out.open(newline="", encoding="utf-8") as file:
        by_count, by_tokens, packed = csv.DictReader(file)
    assert by_count["grouping"] == "padded, by count"
    for view in ("teacher", "student"):
        padding = [float(line[f"{view}_padding"]) for line in (by_count, by_tokens, packed)]
        assert padding[0] > 0
        assert padding[1] <= padding[0]
        assert padding[2] == 0
        assert int(packed[f"{view}_microbatches"]) <= int(by_count[f"{view}_microbatches"])
    assert float(packed["loss"]) == pytest.approx(float(by_count["loss"]), rel=1e-5)
    assert float(by_tokens["loss"]) == pytest.approx(float(by_count["loss"]), rel=1e-5)
    assert not (tmp_path / "run").exists()
