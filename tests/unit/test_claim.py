"""The lock of a run's folder, and moving what an earlier run left aside."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_copsd.errors import UserError
from megatron_copsd.records.claim import claimed, move_aside
from megatron_copsd.records.paths import RunFolder

HOLDER = """
import sys
from pathlib import Path
from megatron_copsd.records.claim import claimed
from megatron_copsd.records.paths import RunFolder
with claimed(RunFolder(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of ``tmp_path / "run"``."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_another_run_is_refused_and_named(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    run = RunFolder(tmp_path / "run")
    with (
        pytest.raises(UserError, match=rf"run\.dir: .*another run writes there \(process {holder.pid} on"),
        claimed(run),
    ):
        pass
    with pytest.raises(UserError, match="another run writes there"):
        move_aside(run)
    assert not (tmp_path / "run.1").exists()


def test_a_killed_run_leaves_no_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with claimed(RunFolder(tmp_path / "run")):
        pass


def test_a_fork_does_not_keep_the_lock(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    reading, writing = os.pipe()
    with claimed(run):
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
    with claimed(run):
        pass
    os.close(writing)
    os.waitpid(child, 0)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "lockf", refuse)


@pytest.mark.parametrize(
    ("host", "process", "age", "alive"),
    [
        (os.uname().nodename, os.getpid(), 3600, True),
        (os.uname().nodename, 2**22 + 1, 0, False),
        ("elsewhere", 1, 10, True),
        ("elsewhere", 1, 120, False),
    ],
    ids=["here", "here and gone", "elsewhere", "elsewhere and silent"],
)
def test_without_locks_who_beats_is_alive(
    tmp_path: Path, no_locks: None, host: str, process: int, age: float, alive: bool
) -> None:
    run = RunFolder(tmp_path)
    began = psutil.Process().create_time()
    run.lock.write_text(json.dumps({"host": host, "process": process, "began": began}), encoding="utf-8")
    beat = time.time() - age
    os.utime(run.lock, (beat, beat))
    if alive:
        with pytest.raises(UserError, match=f"process {process} on {host}"), claimed(run):
            pass
    else:
        with claimed(run):
            assert json.loads(run.lock.read_text(encoding="utf-8"))["process"] == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == (["run.lock"] if alive else [])  # one that was there stays


def test_a_lock_that_can_not_be_made(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.lock.symlink_to(tmp_path / "missing" / "lock")
    with pytest.raises(UserError, match=r"run\.lock can't be made"), claimed(run):
        pass


def test_an_unused_folder_is_left_as_it_was(tmp_path: Path) -> None:
    with claimed(RunFolder(tmp_path / "run")):
        assert (tmp_path / "run" / "run.lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_moved_aside_under_the_next_free_name(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    for number in (1, 2):
        run.root.mkdir()
        (run.root / "metrics.jsonl").write_text(f"{number}\n", encoding="utf-8")
        assert move_aside(run) == tmp_path / f"run.{number}"
        assert (tmp_path / f"run.{number}" / "metrics.jsonl").read_text(encoding="utf-8") == f"{number}\n"
        assert not run.root.exists()


def test_what_can_not_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with (
        pytest.raises(UserError, match=r"run\.dir: .*can't write there"),
        claimed(RunFolder(tmp_path / "file" / "run")),
    ):
        pass
