"""Started by a test: runs commands of copsd one after another, each in a process forked from this one.

commands_worker.py PLAN, a JSON list: {"arguments", "killed_at", "out", "err", "code"}. What a command prints goes to
the files ``out`` and ``err``, its exit code to ``code``. Importing takes longer than most of these commands: it is done
once for all.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking CUDA itself would leave it useless after a fork

import transformers.models.auto  # noqa: F401

from copsd_tools import cli, evaluate, export, train  # noqa: F401
from megatron_copsd import platform

with platform.importing_megatron():
    import megatron_copsd.run
    import megatron_copsd.train  # noqa: F401


def kill_at(place: str) -> None:
    """Kill this process and all it starts as soon as it opens a file at or below a path, whatever else is happening."""
    leader = os.getpid()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and (str(arguments[0]) == place or str(arguments[0]).startswith(place + os.sep)):
            os.killpg(leader, signal.SIGKILL)

    os.setsid()
    sys.addaudithook(watch)


def begin(plan: dict[str, Any]) -> list[str]:
    """In the new process: its output, its death; returns the arguments."""
    for name, descriptor in (("out", 1), ("err", 2)):
        file = os.open(plan[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    if plan["killed_at"] is not None:
        kill_at(plan["killed_at"])
    return plan["arguments"]


def main() -> int:
    gc.freeze()
    for plan in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        process = os.fork()
        if process == 0:
            return cli.main(begin(plan))
        _, status = os.waitpid(process, 0)
        Path(plan["code"]).write_text(str(os.waitstatus_to_exitcode(status)), encoding="ascii")
    return 0


if __name__ == "__main__":
    sys.exit(main())
