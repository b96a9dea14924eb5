"""``copsd bench rollout`` and ``copsd bench sync`` against real servers."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from processes import copsd

from copsd_tools.bench.csv_lines import append_lines
from copsd_tools.bench.provenance import here
from copsd_tools.bench.servers.sync import SyncSpeed
from megatron_copsd.errors import UserError
from megatron_copsd.hf.folder import TensorReader

pytestmark = pytest.mark.sglang


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rollout_speed_of_a_server_that_is_there(served: str, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "rollout.csv"
    options = ("--requests", 4, "--prompt-tokens", 6, "--response-tokens", 5, "--concurrency", 1, 6, "--csv", out)
    done = copsd("bench", "rollout", config, f"run.dir={tmp_path}", f"sglang.urls=[{served}]", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokens/s" in done.stdout
    alone, together = lines(out)
    assert (alone["concurrency"], alone["requests"]) == ("1", "4")
    assert (together["concurrency"], together["requests"]) == ("6", "6")
    for line in (alone, together):
        tokens, seconds = int(line["response_tokens"]), float(line["seconds"])
        assert int(line["requests"]) <= tokens <= 5 * int(line["requests"])
        assert float(line["tokens_per_second"]) == pytest.approx(tokens / seconds)


def test_sync_speed_of_every_transport(config: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "sync.csv"
    # Small buckets, so that there are several; a transport again, which the server meets as a new trainer.
    transports = ("disk", "distributed", "tensor", "distributed")
    options = ("--transports", *transports, "--repeats", 2, "--csv", out)
    done = copsd("bench", "sync", config, f"run.dir={tmp_path}", "rollout.bucket_mb=0.02", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    found = lines(out)
    assert [line["transport"] for line in found] == list(transports)
    reader = TensorReader(model)
    size = sum(reader.get(name).nbytes for name in reader.names()) / 1e9
    for line in found:
        assert float(line["gigabytes"]) == pytest.approx(size)
        assert 0 < float(line["min_s"]) <= float(line["median_s"])
        assert float(line["gb_per_second"]) == pytest.approx(size / float(line["median_s"]))
    assert not list(tmp_path.rglob("version_*"))


def test_a_file_of_other_columns_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "other.csv"
    out.write_text("a,b\n1,2\n", encoding="utf-8")
    speed = SyncSpeed("model", "float32", 1, "disk", 256.0, 0.1, 0.5, 0.5, 0.2)
    with pytest.raises(UserError, match="other columns"):
        append_lines(out, [speed], here("cpu", []))
    assert out.read_text(encoding="utf-8") == "a,b\n1,2\n"


def test_no_server_at_the_address(config: Path, tmp_path: Path) -> None:
    overrides = (f"run.dir={tmp_path}", "sglang.urls=[http://127.0.0.1:9]")
    done = copsd("bench", "rollout", config, *overrides)
    assert done.returncode == 2
    assert "copsd serve" in done.stderr
