"""A training in processes of its own that is to be ended, and all of whose processes can be found."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import psutil
from processes import PATIENCE, ROOT, environment, wait_until

_MARK = "COPSD_TEST_MARK"


class Training:
    """``copsd train`` as a user starts it.

    Attributes:
        run: its folder.
        process: what the user started.
        printed: file with all that was printed.
    """

    def __init__(self, config: Path, run: Path, *arguments: str, processes: int = 1, log: Path) -> None:
        """Start it; ``log`` is the file to print into."""
        self.run = run
        self.printed = log
        self._mark = uuid.uuid4().hex
        nproc = ["--nproc", str(processes)] if processes > 1 else []
        command = [sys.executable, "-m", "copsd_tools.cli", "train", config, f"run.dir={run}", *arguments, *nproc]
        with log.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env={**environment(), _MARK: self._mark},
                preexec_fn=_heed_signals,
            )  # fmt: skip

    def lines(self) -> int:
        """Number of lines of metrics.jsonl; 0 where there is none."""
        path = self.run / "metrics.jsonl"
        return path.read_text(encoding="utf-8").count("\n") if path.is_file() else 0

    def wait_for(self, lines: int) -> bool:
        """Wait for so many lines, or for the end; returns whether it still runs."""
        wait_until(lambda: self.lines() >= lines or self.process.poll() is not None, every=0.02)
        return self.process.poll() is None

    def alive(self) -> list[psutil.Process]:
        """All processes that the training has started and that have not ended, itself included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
                continue
        return found

    def workers(self) -> list[psutil.Process]:
        """Its processes that train, by rank; the training's own process where it starts no others."""
        ranked = []
        for process in self.alive():
            try:
                rank = process.environ().get("RANK")
            except psutil.Error:
                continue
            if rank is not None and process.ppid() == self.process.pid:
                ranked.append((int(rank), process))
        return [process for _, process in sorted(ranked, key=lambda pair: pair[0])] or [
            psutil.Process(self.process.pid)
        ]

    def end(self, number: int, to: psutil.Process | None = None) -> int:
        """Send a signal to the started process, or to another, and return the exit code.

        None of its processes may be left.
        """
        with contextlib.suppress(ProcessLookupError):
            os.kill(to.pid if to else self.process.pid, number)
        code = self.process.wait(PATIENCE)
        wait_until(lambda: not self.alive(), every=0.05)
        return code

    def text(self) -> str:
        """What was printed."""
        return self.printed.read_text(encoding="utf-8")


def _heed_signals() -> None:
    """Whoever runs the tests in the background of a shell, or under nohup, has signals ignored, and hands that on."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def one_line(text: str, words: Sequence[str]) -> str:
    """Return the only line that holds all words."""
    found = [line for line in text.splitlines() if all(word in line for word in words)]
    assert len(found) == 1, text
    return found[0]
