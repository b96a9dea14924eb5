"""Fixtures shared by all tests."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
from processes import ROOT, copsd


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a HF folder, made once a checkout by the command the README names."""
    folder = ROOT / "runs" / "models" / "SmolLM2-135M-Instruct"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other workers want it too
        done = copsd("smollm2", "--out", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
