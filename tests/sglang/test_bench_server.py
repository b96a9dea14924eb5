"""``copsd bench rollout`` and ``copsd bench sync`` against real servers."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import plan_of
from processes import copsd

from megatron_copsd.hf.folder import TensorReader
from megatron_copsd.rollout.sglang_server import SglangServer, start_all

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def server(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangServer]:
    server = SglangServer(plan_of(config, tmp_path_factory.mktemp("bench")))
    start_all([server], 300)
    yield server
    server.stop()


def test_rollout_speed_of_a_server_of_its_own(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "rollout.csv"
    options = ("--requests", 4, "--prompt-tokens", 6, "--response-tokens", 5, "--concurrency", 1, 6, "--csv", out)
    done = copsd("bench", "rollout", config, f"run.dir={tmp_path}", *options, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokens/s" in done.stdout
    alone, together = lines(out)
    assert (alone["concurrency"], alone["requests"]) == ("1", "4")
    assert (together["concurrency"], together["requests"]) == ("6", "6")
    for line in (alone, together):
        tokens, seconds = int(line["response_tokens"]), float(line["seconds"])
        assert int(line["requests"]) <= tokens <= 5 * int(line["requests"])
        assert float(line["tokens_per_second"]) == pytest.approx(tokens / seconds)


def test_sync_speed_of_every_transport_time_and_again(
    server: SglangServer, config: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sync.csv"
    # Small buckets, so that there are several; twice, so that the server meets new trainers.
    overrides = (f"run.dir={tmp_path}", f"sglang.urls=[{server.url}]", "rollout.bucket_mb=0.02")
    for _ in range(2):
        done = copsd("bench", "sync", config, *overrides, "--repeats", 2, "--csv", out, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    found = lines(out)
    assert [line["transport"] for line in found] == ["disk", "distributed", "tensor"] * 2
    reader = TensorReader(model)
    size = sum(reader.get(name).nbytes for name in reader.names()) / 1e9
    for line in found:
        assert float(line["gigabytes"]) == pytest.approx(size)
        assert 0 < float(line["min_s"]) <= float(line["median_s"])
        assert float(line["gb_per_second"]) == pytest.approx(size / float(line["median_s"]))
    assert not (tmp_path / "bench_sync").exists()


def test_a_file_of_other_columns_is_left_alone(server: SglangServer, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "other.csv"
    out.write_text("a,b\n1,2\n", encoding="utf-8")
    overrides = (f"run.dir={tmp_path}", f"sglang.urls=[{server.url}]")
    done = copsd("bench", "sync", config, *overrides, "--transports", "disk", "--repeats", 1, "--csv", out)
    assert done.returncode == 2
    assert "other columns" in done.stderr
    assert out.read_text(encoding="utf-8") == "a,b\n1,2\n"


def test_no_server_at_the_address(config: Path, tmp_path: Path) -> None:
    overrides = (f"run.dir={tmp_path}", "sglang.urls=[http://127.0.0.1:9]")
    done = copsd("bench", "rollout", config, *overrides)
    assert done.returncode == 2
    assert "copsd serve" in done.stderr
