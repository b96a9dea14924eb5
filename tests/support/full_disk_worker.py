"""Started by a test in a mount namespace of its own: runs that meet a full disk, then the same with room.

full_disk_worker.py PLAN OUT: PLAN is JSON, a list of cases {"name", "arguments", "run", "mounts"}; mounts are small
file systems by folder below the run, "" the run itself, with their size in KiB. What was seen goes to OUT, by name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import commands_worker  # noqa: F401 - imports what takes long, once

from copsd_tools import cli
from megatron_copsd.records import manifest
from megatron_copsd.records.paths import RunFolder

ROOM = "64m"


def copsd(arguments: list[str], log: Path) -> tuple[int, str]:
    """Run a command in a process forked from this one; returns its exit code and what it printed."""
    process = os.fork()
    if process == 0:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.exit(cli.main(arguments))
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8")


def mount(options: str, *where: object) -> None:
    subprocess.run(["mount", "-o", options, *map(str, where)], check=True)


def meet(case: dict[str, Any], log: Path) -> dict[str, Any]:
    run = Path(case["run"])
    places = {run / below: size for below, size in case["mounts"].items()}
    for place, size in places.items():
        place.mkdir(parents=True, exist_ok=True)
        mount(f"size={size}k", "-t", "tmpfs", "tmpfs", place)
    code, printed = copsd(case["arguments"], log)
    folder = RunFolder(run)
    seen = {
        "code": code,
        "printed": printed,
        "partial": sorted(str(path.relative_to(run)) for path in run.rglob("*.partial")),
        "damage": [text for path in folder.complete_checkpoints() for text in manifest.damage(path)],
        "kept": [path.name for path in folder.complete_checkpoints()],
    }
    for place in places:
        mount(f"remount,size={ROOM}", place)
    code, printed = copsd(case["arguments"], log)
    metrics = folder.metrics.read_text(encoding="utf-8") if folder.metrics.is_file() else ""
    return {**seen, "code_with_room": code, "printed_with_room": printed, "metrics": metrics}


def main() -> int:
    plan, out = Path(sys.argv[1]), Path(sys.argv[2])
    found = {}
    for case in json.loads(plan.read_text(encoding="utf-8")):
        found[case["name"]] = meet(case, plan.with_name(f"{case['name']}.log"))
    out.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
