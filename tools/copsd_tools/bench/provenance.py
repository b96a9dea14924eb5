"""Where measurements come from: device, commit, versions, day and command."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from copsd_tools.command_line.checkout import commit, package_version


@dataclass(frozen=True)
class Provenance:
    """Where a measurement comes from.

    Attributes:
        device_name: name of the GPU or CPU.
        commit: ``git describe --always --dirty`` of the code.
        torch, triton, liger_kernel, cut_cross_entropy: versions; empty where not installed.
        date: day, UTC.
        command: the command line.
    """

    device_name: str
    commit: str
    torch: str
    triton: str
    liger_kernel: str
    cut_cross_entropy: str
    date: str
    command: str


def here(device: str, arguments: Sequence[str]) -> Provenance:
    """Provenance of what this process measures on "cpu" or "cuda"; ``arguments`` are those of ``copsd bench``."""
    return Provenance(
        device_name=device_name(device),
        commit=commit() or "unknown",
        torch=torch.__version__,
        triton=package_version("triton"),
        liger_kernel=package_version("liger-kernel"),
        cut_cross_entropy=package_version("cut-cross-entropy"),
        date=datetime.now(UTC).date().isoformat(),
        command=shlex.join(["copsd", "bench", *arguments]),
    )


def present_device() -> str:
    """Return "cuda" where torch finds a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    """Name of the GPU or CPU that measures."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
