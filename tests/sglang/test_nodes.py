"""A run of two nodes, each with a server of its own; here both nodes are this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import ROOT, environment, metrics
from sglang_servers import CHECKED, alive

from megatron_copsd.rollout.sglang.process import free_port

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(1200)]


def start_nodes(*arguments: str) -> list[subprocess.Popen[str]]:
    port = str(free_port("127.0.0.1"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    place = ["--master-addr", "127.0.0.1", "--master-port", port, "-m", "copsd_tools.cli", "train", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [
        subprocess.Popen([*launcher, "--node-rank", str(node), *place], env=environment(), cwd=ROOT, **pipes)
        for node in range(2)
    ]


def servers_of(node: subprocess.Popen[str]) -> list[psutil.Process]:
    """Main processes of the servers that a node's trainer has started."""
    children = psutil.Process(node.pid).children(recursive=True)
    return [child for child in children if "sglang.launch_server" in child.cmdline()]


def starts(log: Path) -> int:
    return log.read_text(encoding="utf-8", errors="replace").count("server_args=")


def test_each_node_serves_and_its_server_is_started_again(config: Path, tmp_path: Path) -> None:
    nodes = start_nodes(str(config), f"run.dir={tmp_path}", "sglang.host=auto", "run.steps=4", *CHECKED)
    deadline = time.monotonic() + 600
    while not (tmp_path / "metrics.jsonl").exists() or not metrics(tmp_path):
        assert time.monotonic() < deadline
        assert all(node.poll() is None for node in nodes), [node.communicate()[0] for node in nodes]
        time.sleep(0.2)
    (victim,) = servers_of(nodes[1])
    (other,) = servers_of(nodes[0])
    os.kill(victim.pid, signal.SIGKILL)
    outputs = [node.communicate(timeout=600)[0] for node in nodes]
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


def test_servers_that_other_nodes_cannot_reach_are_refused(config: Path, tmp_path: Path) -> None:
    nodes = start_nodes(str(config), f"run.dir={tmp_path}")
    outputs = [node.communicate(timeout=600)[0] for node in nodes]
    assert all(node.returncode for node in nodes)
    assert "sglang.host: '127.0.0.1': the run has 2 nodes" in "".join(outputs)
    assert not list(tmp_path.glob("sglang_*.log"))
