"""Which code runs: the version that is installed and, in a checkout, the commit."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

# The repository in a checkout; beside it lie configurations and constraints that no installed package has.
ROOT = Path(__file__).resolve().parents[3]


def package_version(package: str) -> str:
    """Version of an installed package; empty where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str | None:
    """``git describe --always --dirty`` of the code; None where it is no checkout, or git is missing."""
    if not (ROOT / ".git").exists():
        return None  # git would find the repository of a virtual environment's folder
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def version() -> str:
    """The project's version, and the commit where there is one."""
    number, found = package_version("megatron-copsd") or "(not installed)", commit()
    return number if found is None else f"{number}, commit {found}"
