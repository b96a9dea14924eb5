"""Processes that form process groups without a launcher: they meet at stores of the process that starts them.

A store binds its port as it is made and keeps it, so that no other program can take it before the ranks meet there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from processes import PATIENCE, ROOT, environment

_HOST = "127.0.0.1"
_POLL_SECONDS = 0.05
_PORTS = "MEETING_PORTS"


def run_ranks(arguments: Sequence[str | Path], count: int, folder: Path, groups: int = 1) -> str:
    """Run ``python ARGUMENTS`` in ``count`` processes to their end; returns what they printed.

    Each enters the groups that it belongs to, one after another, by ``enter_group``. Where one fails, the others would
    wait for it in a collective, so they are ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stores = [dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False) for _ in range(groups)]
    ports = ",".join(str(store.port) for store in stores)
    common = {"MASTER_ADDR": _HOST, "TORCHELASTIC_USE_AGENT_STORE": "True", _PORTS: ports}
    workers = []
    logs = [folder / f"rank{rank}.log" for rank in range(count)]
    for rank, log in enumerate(logs):
        place = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as file:
            workers.append(
                subprocess.Popen(
                    [sys.executable, *map(str, arguments)],
                    env=environment() | place, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
                )
            )  # fmt: skip
    _wait(workers)
    return "\n".join(log.read_text(encoding="utf-8") for log in logs)


def enter_group(number: int, count: int) -> None:
    """In a rank: let the process group that is joined next be that of this number, of the first ``count`` ranks.

    Returns when all are there: some have come from groups that others do not belong to, and what joins the group waits
    for less long than these may take.
    """
    port = os.environ[_PORTS].split(",")[number]
    os.environ |= {"WORLD_SIZE": str(count), "MASTER_PORT": port}
    patience = timedelta(seconds=PATIENCE)
    store = dist.TCPStore(_HOST, int(port), is_master=False, timeout=patience, wait_for_workers=False)
    store.set(f"here/{os.environ['RANK']}", "")
    store.wait([f"here/{rank}" for rank in range(count)], patience)


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + PATIENCE
    try:
        while any(worker.poll() is None for worker in workers) and not any(worker.returncode for worker in workers):
            assert time.monotonic() < deadline, "the ranks take too long"
            time.sleep(_POLL_SECONDS)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
