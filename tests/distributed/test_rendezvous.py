"""Ranks meet where nobody can come first: a port that is told to them is taken already."""

from __future__ import annotations

import json
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from layouts import LayoutCase, run_cases
from safetensors.torch import load_file
from tiny import make_model, settings, write_config


def ports_told(folder: Path, environment: dict[str, str]) -> set[int]:
    """Every port that the ranks are given, in the environment or in their plan."""
    plans = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    told = [plan["port"] for plan in plans if "port" in plan] + [environment.get("MASTER_PORT", "")]
    told += environment.get("MEETING_PORTS", "").split(",")
    return {int(port) for port in told if port}


def test_somebody_else_wants_the_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, refusals = subprocess.Popen, []
    with ExitStack() as stack:

        def take_ports(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
            for port in ports_told(tmp_path, options["env"]):
                rival = stack.enter_context(socket.socket())
                rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    rival.bind(("127.0.0.1", port))
                    rival.listen()
                except OSError as error:
                    refusals.append(error)
            return start(command, **options)

        monkeypatch.setattr(subprocess, "Popen", take_ports)
        model = make_model(tmp_path / "model")
        config = write_config(tmp_path, settings(tmp_path, model, run={"steps": 1}))
        case = LayoutCase("DP2", 2)
        runs = run_cases([case], config, load_file(model / "model.safetensors"), tmp_path)
    assert len(runs.outcome(case).steps) == 1
    assert refusals, "nobody wanted the port"
