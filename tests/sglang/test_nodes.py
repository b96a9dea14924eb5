"""A run of two nodes, each with a server of its own; here both nodes are this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from processes import PATIENCE, ROOT, environment, has_steps, metrics, wait_until
from sglang_servers import CHECKED, alive

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


@pytest.fixture
def start_nodes() -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """Starts the launchers of two nodes in no certain order; they meet at a store that has bound its port itself."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{store.port}", "--rdzv-conf", "is_host=0"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meeting]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}

    def start(*arguments: str) -> list[subprocess.Popen[str]]:
        command = [*launcher, "-m", "copsd_tools.cli", "train", *arguments]
        return [subprocess.Popen(command, env=environment(), cwd=ROOT, **pipes) for _ in range(2)]

    yield start
    del store


def number_of(node: subprocess.Popen[str]) -> int:
    """Number of a node in the run."""
    numbers = (child.environ().get("GROUP_RANK") for child in psutil.Process(node.pid).children())
    return int(next(number for number in numbers if number is not None))


def servers_of(node: subprocess.Popen[str]) -> list[psutil.Process]:
    """Main processes of the servers that a node's trainer has started."""
    children = psutil.Process(node.pid).children(recursive=True)
    return [child for child in children if "sglang.launch_server" in child.cmdline()]


def starts(log: Path) -> int:
    return log.read_text(encoding="utf-8", errors="replace").count("server_args=")


def test_each_node_serves_and_its_server_is_started_again(start_nodes: Callable, config: Path, tmp_path: Path) -> None:
    nodes = start_nodes(str(config), f"run.dir={tmp_path}", "sglang.host=auto", "run.steps=4", *CHECKED)

    def ended() -> bool:
        return any(node.poll() is not None for node in nodes)

    wait_until(lambda: ended() or has_steps(tmp_path))
    assert not ended(), [node.communicate()[0] for node in nodes]
    first, second = sorted(nodes, key=number_of)
    (victim,) = servers_of(second)
    (other,) = servers_of(first)
    os.kill(victim.pid, signal.SIGKILL)
    outputs = [node.communicate(timeout=PATIENCE)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]
    records = [
        json.loads(line)
        for file in sorted((tmp_path / "rollouts").glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    assert len({(record["step"], record["index"]) for record in records}) == len(records) == 4 * 6
    assert [starts(tmp_path / f"sglang_{number}.log") for number in range(2)] == [1, 2]
    assert not alive(victim.pid)
    assert not alive(other.pid)


def test_servers_that_other_nodes_cannot_reach_are_refused(start_nodes: Callable, config: Path, tmp_path: Path) -> None:
    nodes = start_nodes(str(config), f"run.dir={tmp_path}")
    outputs = [node.communicate(timeout=PATIENCE)[0] for node in nodes]
    assert all(node.returncode for node in nodes)
    assert "sglang.host: '127.0.0.1': the run has 2 nodes" in "".join(outputs)
    assert not list(tmp_path.glob("sglang_*.log"))
