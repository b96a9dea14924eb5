"""``copsd serve``: a server by itself, and a trainer that uses it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import psutil
import pytest
from processes import PATIENCE, ROOT, environment, metrics, train
from sglang_servers import CHECKED, alive

pytestmark = pytest.mark.sglang


def test_a_server_for_a_trainer_elsewhere(config, tmp_path):
    command = [sys.executable, "-m", "copsd_tools.cli", "serve", str(config), f"run.dir={tmp_path / 'served'}"]
    served = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        found = re.search(r"ready: (http://\S+)", next(line for line in served.stdout if "ready:" in line))
        processes = psutil.Process(served.pid).children(recursive=True)
        train(config, f"run.dir={tmp_path}", f"sglang.urls=[{found[1]}]", f"sglang.folder={tmp_path}", *CHECKED)
        assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]
        assert list(tmp_path.glob("copsd-*")) == [], "the weights' folder goes with the run"
        assert (tmp_path / "metrics.jsonl").exists(), "and nothing else does"
        served.send_signal(signal.SIGTERM)
        assert served.wait(PATIENCE) == 0
    finally:
        served.kill()
    assert len(processes) > 1
    assert not any(alive(process.pid) for process in processes)
