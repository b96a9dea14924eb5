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

import httpx
import psutil
import pytest
from processes import PATIENCE, ROOT, environment, has_steps, wait_until
from sglang_servers import alive, family, make_client, plan_of, wait_until_sampling, weights
from small_tokenizer import small_tokenizer

from megatron_copsd.errors import UserError
from megatron_copsd.rollout.engine import Bucket, Request, Sampling
from megatron_copsd.rollout.sglang.client import Answer, ServerLost, SglangClient
from megatron_copsd.rollout.sglang.engine import EngineOptions, SglangEngine
from megatron_copsd.rollout.sglang.ports import is_free, reserve_port
from megatron_copsd.rollout.sglang.process import SglangServer, start_all
from megatron_copsd.sync.disk import DiskTransport

pytestmark = pytest.mark.sglang

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


def begin(engine: SglangEngine, model: Path) -> int:
    """Bring the weights and start sampling; returns their version. What is lost is made again by the next one's.

    So it is with rollout.ahead: the trainer has gone on meanwhile.
    """
    begun = (engine.weight_version or 0) + 7
    engine.update_weights(weights(model), begun)
    engine.begin(REQUESTS, SAMPLING)
    return begun


def check_complete(engine: SglangEngine, begun: int, started: float, name: str) -> None:
    rollouts = engine.finish(begun + 1)
    assert len(rollouts) == len(REQUESTS)
    versions = {rollout.weight_version for rollout in rollouts}
    assert versions <= {begun, begun + 1}
    assert (begun + 1 in versions) == (engine.weight_version == begun + 1)
    assert all(rollout.response[-1] == 1 or len(rollout.response) == SAMPLING.max_tokens for rollout in rollouts)
    print(f"\n{name}: {time.monotonic() - started:.0f} s, {engine.fleet.restarts} restart(s)")


def check_lost_in_mid_batch(engine: SglangEngine, model: Path, fault: str) -> None:
    restarts = engine.fleet.restarts
    begun = begin(engine, model)
    before = family(pid(engine))
    wait_until_sampling(engine.clients[0].url)
    started = time.monotonic()
    victim, number = {
        "main killed": (pid(engine), signal.SIGKILL),
        "scheduler killed": (scheduler(engine), signal.SIGKILL),
        "terminated": (pid(engine), signal.SIGTERM),
        "stopped": (pid(engine), signal.SIGSTOP),
        "scheduler stopped": (scheduler(engine), signal.SIGSTOP),
    }[fault]
    os.kill(victim, number)
    check_complete(engine, begun, started, fault)
    if fault == "terminated":
        wait_until(lambda: not alive(victim))  # it answers what it has, and ends: it is missed when it is asked again
    engine.begin(REQUESTS[:2], SAMPLING)
    assert len(engine.finish(begun + 2)) == 2
    assert engine.fleet.restarts == restarts + 1
    assert not any(alive(process) for process in before)


@pytest.mark.parametrize("fault", ["main killed", "scheduler killed", "terminated", "stopped"])
def test_a_server_lost_in_mid_batch_costs_no_rollout(engine, model, fault):
    check_lost_in_mid_batch(engine, model, fault)


@pytest.mark.slow
def test_a_scheduler_that_hangs_in_mid_batch_costs_no_rollout(start_engine, model):
    # What is silent for longer hangs: all batches here are small.
    check_lost_in_mid_batch(start_engine(silence_seconds=60.0), model, "scheduler stopped")


def test_requests_that_are_aborted_are_sent_again(engine, model, monkeypatch):
    lost = []

    def watched(client: SglangClient, *arguments: object) -> Answer:
        try:
            return generate(client, *arguments)
        except ServerLost as error:
            lost.append(str(error))
            raise

    generate = SglangClient.generate
    monkeypatch.setattr(SglangClient, "generate", watched)
    restarts = engine.fleet.restarts
    begun, started = begin(engine, model), time.monotonic()
    wait_until_sampling(engine.clients[0].url)
    engine.clients[0].call("/abort_request", {"abort_all": True})
    check_complete(engine, begun, started, "aborted")
    assert engine.fleet.restarts == restarts
    assert lost
    assert all("abort" in text for text in lost), lost


def test_a_checkpoint_truncated_on_its_way_is_sent_again(engine, model, monkeypatch):
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
    check_complete(engine, begin(engine, model), started, "truncated checkpoint")
    assert len(attempts) == 2


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
    engine.update_weights(killing, 7)
    engine.begin(REQUESTS, SAMPLING)
    check_complete(engine, 7, started, "killed in a weight sync")
    assert engine.fleet.restarts == 1


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["distributed", "tensor"])
def test_one_of_two_servers_lost_between_syncs(start_engine, model, transport):
    engine = start_engine(transport, servers=2)
    engine.update_weights(weights(model), 1)
    os.kill(pid(engine), signal.SIGKILL)
    started = time.monotonic()
    check_complete(engine, begin(engine, model), started, f"one of two servers, {transport}")
    assert engine.fleet.restarts == 1


@pytest.mark.slow
def test_somebody_elses_server_is_waited_for(config, model, group, tmp_path):
    with reserve_port("127.0.0.1") as reservation:  # the server that comes back has to have the same
        plan = plan_of(config, tmp_path, port=reservation.getsockname()[1])
        servers = [SglangServer(plan), SglangServer(plan)]
        start_all(servers[:1], PATIENCE)
        transport = DiskTransport(tmp_path / "weights", model, PATIENCE)
        options = EngineOptions(concurrency=8, attempts=2, start_seconds=PATIENCE)
        engine = SglangEngine([make_client(servers[0].url, model)], None, transport, small_tokenizer(), options)
        try:
            begun = begin(engine, model)
            wait_until_sampling(servers[0].url)
            started = time.monotonic()
            servers[0].kill()
            with ThreadPoolExecutor(max_workers=1) as elsewhere:
                again = elsewhere.submit(start_all, servers[1:], PATIENCE)
                rollouts = engine.finish(begun + 1)
                again.result()
            print(f"\nsomebody else's, killed: {time.monotonic() - started:.0f} s")
            assert len(rollouts) == len(REQUESTS)
            assert engine.weight_version == begun + 1
        finally:
            engine.close()
            for server in servers:
                server.stop()


@pytest.mark.slow
def test_a_port_lost_to_another_server_is_noticed_and_another_tried(config, tmp_path, monkeypatch):
    """Somebody else's server listens before ours has loaded its model, and says that it is ready."""
    start, rivals = subprocess.Popen, []

    def lose(command, **options):
        if not rivals:
            port = int(command[command.index("--port") + 1])
            answer = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
            (tmp_path / "ready").touch()
            rivals.append(start(answer, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            wait_until(lambda: not is_free("127.0.0.1", port))
        return start(command, **options)

    monkeypatch.setattr(subprocess, "Popen", lose)
    server = SglangServer(plan_of(config, tmp_path))
    try:
        start_all([server], PATIENCE)
        assert httpx.get(f"{server.url}/server_info", trust_env=False).is_success
    finally:
        server.stop()
        rivals[0].kill()
    assert "address already in use" in (tmp_path / "sglang_0.log").read_text(encoding="utf-8", errors="replace")


def test_a_full_disk_ends_the_run_with_its_reason(config, tmp_path):
    """Files that may not grow stand in for a disk that is full: the system refuses to write all the same."""
    command = [sys.executable, "-m", "copsd_tools.cli", "train", str(config), f"run.dir={tmp_path}", "run.steps=999"]
    run = subprocess.Popen(
        [*command, "parallel.tensor=2", "--nproc", "2"],
        env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_until(lambda: run.poll() is not None or has_steps(tmp_path))
        assert run.poll() is None, run.communicate()[0]
        started = time.monotonic()
        processes = psutil.Process(run.pid).children(recursive=True)
        for process in processes:
            if "copsd_tools.cli" in process.cmdline():
                # The weights' files are larger, the run's others smaller.
                process.rlimit(psutil.RLIMIT_FSIZE, (40_000, 40_000))
        output = run.communicate(timeout=PATIENCE)[0]
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
            start_all([server], PATIENCE)


def test_a_server_that_ends_early_shows_its_log(config, tmp_path):
    server = SglangServer(plan_of(config, tmp_path, extra_arguments=("--no-such-argument",)))
    server.start()
    leader = server.pid
    with pytest.raises(UserError, match="exit code") as caught:
        server.wait_until_ready(PATIENCE)
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
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    processes = [int(number) for number in (tmp_path / "family").read_text(encoding="ascii").split()]
    assert len(processes) > 1
    wait_until(lambda: not any(alive(process) for process in processes))
