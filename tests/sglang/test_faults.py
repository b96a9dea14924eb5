"""What dies, hangs or is full costs time and nothing else: real servers, real signals."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from processes import ROOT, environment, metrics
from sglang_servers import alive, family, make_client, plan_of, weights
from small_tokenizer import small_tokenizer

from megatron_copsd.errors import UserError
from megatron_copsd.rollout.engine import Bucket, Request, Sampling
from megatron_copsd.rollout.sglang.client import Answer, ServerLost, SglangClient
from megatron_copsd.rollout.sglang.engine import EngineOptions, SglangEngine
from megatron_copsd.rollout.sglang.process import SglangServer, free_port, start_all
from megatron_copsd.sync.disk import DiskTransport

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]

# Long enough to be under way when the fault strikes.
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=400, stop_ids=(1,))
REQUESTS = [Request((5 + index, 7, 9), index) for index in range(8)]


def pid(engine: SglangEngine) -> int:
    return engine.fleet.own[0].pid


def scheduler(engine: SglangEngine) -> int:
    (found,) = (
        c.pid for c in psutil.Process(pid(engine)).children(recursive=True) if "scheduler" in " ".join(c.cmdline())
    )
    return found


# The trainer has gone on meanwhile, as with rollout.ahead: what is asked for again is made by its newer weights.
BEGUN, NOW = 7, 8


def check_complete(engine: SglangEngine, started: float, name: str) -> None:
    rollouts = engine.finish(NOW)
    assert len(rollouts) == len(REQUESTS)
    versions = {rollout.weight_version for rollout in rollouts}
    assert versions <= {BEGUN, NOW}
    assert (NOW in versions) == (engine.weight_version == NOW)
    assert all(rollout.response[-1] == 1 or len(rollout.response) == SAMPLING.max_tokens for rollout in rollouts)
    print(f"\n{name}: {time.monotonic() - started:.0f} s, {engine.fleet.restarts} restart(s)")


@pytest.mark.parametrize(
    "fault",
    [
        "main killed",
        "scheduler killed",
        "terminated",
        "stopped",
        pytest.param("scheduler stopped", marks=pytest.mark.slow),
    ],
)
def test_a_server_lost_in_mid_batch_costs_no_rollout(start_engine, model, fault):
    engine = start_engine()
    engine.update_weights(weights(model), BEGUN)
    before = family(pid(engine))
    started = time.monotonic()
    engine.begin(REQUESTS, SAMPLING)
    time.sleep(1.0)
    victim, number = {
        "main killed": (pid(engine), signal.SIGKILL),
        "scheduler killed": (scheduler(engine), signal.SIGKILL),
        "terminated": (pid(engine), signal.SIGTERM),
        "stopped": (pid(engine), signal.SIGSTOP),
        "scheduler stopped": (scheduler(engine), signal.SIGSTOP),
    }[fault]
    os.kill(victim, number)
    check_complete(engine, started, fault)
    while fault == "terminated" and alive(victim):
        time.sleep(0.5)  # it answers what it has, and then ends: it is missed only when it is asked again
    engine.begin(REQUESTS[:2], SAMPLING)
    assert len(engine.finish(NOW)) == 2
    assert engine.fleet.restarts == 1
    engine.close()
    assert not any(alive(process) for process in before)


def test_requests_that_are_aborted_are_sent_again(start_engine, model, monkeypatch):
    lost = []

    def watched(client: SglangClient, *arguments: object) -> Answer:
        try:
            return generate(client, *arguments)
        except ServerLost as error:
            lost.append(str(error))
            raise

    generate = SglangClient.generate
    monkeypatch.setattr(SglangClient, "generate", watched)
    engine = start_engine()
    engine.update_weights(weights(model), BEGUN)
    started = time.monotonic()
    engine.begin(REQUESTS, SAMPLING)
    time.sleep(1.0)
    engine.clients[0].call("/abort_request", {"abort_all": True})
    check_complete(engine, started, "aborted")
    assert engine.fleet.restarts == 0
    assert lost
    assert all("abort" in text for text in lost), lost


def test_a_checkpoint_truncated_on_its_way_is_sent_again(start_engine, model, monkeypatch):
    engine = start_engine()
    write = type(engine.transport)._write
    attempts = []

    def truncating(self: object, folder: Path, buckets: object) -> None:
        write(self, folder, buckets)
        attempts.append(folder)
        if len(attempts) == 1:
            file = sorted(folder.glob("*.safetensors"))[0]
            os.truncate(file, file.stat().st_size // 2)

    monkeypatch.setattr(type(engine.transport), "_write", truncating)
    started = time.monotonic()
    engine.update_weights(weights(model), BEGUN)
    engine.begin(REQUESTS, SAMPLING)
    check_complete(engine, started, "truncated checkpoint")
    assert len(attempts) == 2
    leader = pid(engine)
    engine.close()
    assert not family(leader)


@pytest.mark.slow
def test_a_server_killed_in_a_weight_sync_gets_all_of_it_again(start_engine, model):
    engine = start_engine("distributed")
    source, killed = weights(model), []

    def killing() -> Iterator[Bucket]:
        for number, bucket in enumerate(source()):
            if number == 1 and not killed:
                killed.append(pid(engine))
                os.kill(killed[0], signal.SIGKILL)
            yield bucket

    started = time.monotonic()
    engine.update_weights(killing, BEGUN)
    engine.begin(REQUESTS, SAMPLING)
    check_complete(engine, started, "killed in a weight sync")
    assert engine.fleet.restarts == 1


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["distributed", "tensor"])
def test_one_of_two_servers_lost_between_syncs(start_engine, model, transport):
    engine = start_engine(transport, servers=2)
    engine.update_weights(weights(model), BEGUN - 1)
    os.kill(pid(engine), signal.SIGKILL)
    started = time.monotonic()
    engine.update_weights(weights(model), BEGUN)
    engine.begin(REQUESTS, SAMPLING)
    check_complete(engine, started, f"one of two servers, {transport}")
    assert engine.fleet.restarts == 1


@pytest.mark.slow
def test_somebody_elses_server_is_waited_for(config, model, group, tmp_path):
    plan = plan_of(config, tmp_path, port=free_port("127.0.0.1"))
    servers = [SglangServer(plan), SglangServer(plan)]
    start_all(servers[:1], 300)
    transport = DiskTransport(tmp_path / "weights", model, 60)
    options = EngineOptions(concurrency=8, attempts=2, start_seconds=300)
    engine = SglangEngine([make_client(servers[0].url, model)], None, transport, small_tokenizer(), options)
    try:
        engine.update_weights(weights(model), BEGUN)
        started = time.monotonic()
        engine.begin(REQUESTS, SAMPLING)
        time.sleep(1.0)
        servers[0].kill()
        with ThreadPoolExecutor(max_workers=1) as elsewhere:
            again = elsewhere.submit(start_all, servers[1:], 300)
            rollouts = engine.finish(NOW)
            again.result()
        print(f"\nsomebody else's, killed: {time.monotonic() - started:.0f} s")
        assert len(rollouts) == len(REQUESTS)
        assert engine.weight_version == NOW
    finally:
        engine.close()
        for server in servers:
            server.stop()


def test_a_full_disk_ends_the_run_with_its_reason(config, tmp_path):
    """Files that may not grow stand in for a disk that is full: the system refuses to write all the same."""
    command = [sys.executable, "-m", "copsd_tools.cli", "train", str(config), f"run.dir={tmp_path}", "run.steps=999"]
    run = subprocess.Popen(
        [*command, "parallel.tensor=2", "--nproc", "2"],
        env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while not ((tmp_path / "metrics.jsonl").exists() and metrics(tmp_path)):
            assert run.poll() is None, run.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        started = time.monotonic()
        processes = psutil.Process(run.pid).children(recursive=True)
        for process in processes:
            if "copsd_tools.cli" in process.cmdline():
                # The weights' files are larger, the run's others smaller.
                process.rlimit(psutil.RLIMIT_FSIZE, (40_000, 40_000))
        output = run.communicate(timeout=120)[0]
    finally:
        run.kill()
    print(f"\nfull disk: {time.monotonic() - started:.0f} s")
    assert run.returncode == 2, output
    assert re.search(r"sglang\.folder: .*weights could not be written", output), output
    assert len(processes) > 3, "two trainers, and a server of several processes"
    assert not any(alive(process.pid) for process in processes)


def test_a_port_in_use_is_said_at_once(config, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        server = SglangServer(plan_of(config, tmp_path, port=other.getsockname()[1]))
        with pytest.raises(UserError, match=r"sglang\.port"):
            start_all([server], 60)


def test_a_server_that_ends_early_shows_its_log(config, tmp_path):
    server = SglangServer(plan_of(config, tmp_path, extra_arguments=("--no-such-argument",)))
    server.start()
    leader = server.pid
    with pytest.raises(UserError, match="exit code") as caught:
        server.wait_until_ready(120)
    assert "no-such-argument" in str(caught.value)
    assert not family(leader)


def test_a_server_that_is_never_ready_is_ended(config, tmp_path):
    server = SglangServer(plan_of(config, tmp_path))
    server.start()
    leader = server.pid
    assert family(leader)
    with pytest.raises(UserError, match="not ready within 4 s"):
        server.wait_until_ready(4)
    assert not family(leader)


def test_a_trainer_killed_in_mid_broadcast_leaves_no_server_behind(config, model, tmp_path):
    script = Path(__file__).with_name("dies_in_broadcast.py")
    command = [sys.executable, str(script), str(config), str(model), str(tmp_path)]
    environ = environment() | {"PYTHONPATH": str(ROOT / "tests" / "support")}
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    processes = [int(number) for number in (tmp_path / "family").read_text(encoding="ascii").split()]
    assert len(processes) > 1
    deadline = time.monotonic() + 60
    while any(alive(process) for process in processes):
        assert time.monotonic() < deadline, "a server outlived its trainer"
        time.sleep(0.5)
