"""A run's folder belongs to one run at a time: the lock that says so, and moving what an earlier run left aside."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from megatron_copsd.errors import UserError, describe
from megatron_copsd.records.paths import RunFolder

_HELD = (errno.EACCES, errno.EAGAIN)
# A file system may know no locks (Lustre without its flock option): there, a holder that still beats is alive.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_BEAT_SECONDS = 10.0
_SILENT_SECONDS = 60.0
_TRIES = 100


@contextmanager
def claimed(run: RunFolder) -> Iterator[None]:
    """Hold the lock of a run's folder, which is made, and removed at the end if it was and nothing came into it.

    The lock is one of POSIX (``fcntl``), which shared file systems know and which a process that dies gives up. It is
    not handed on to forked processes.

    Raises:
        UserError: another process holds it, or the folder can't be written.
    """
    made = not run.root.exists()
    descriptor = _taken(run)
    ended = threading.Event()
    try:
        _write(descriptor, {"host": socket.gethostname(), "process": os.getpid(), "began": _began(os.getpid())})
        threading.Thread(target=_beat, args=(run.lock, ended), daemon=True).start()
        yield
    finally:
        ended.set()
        with suppress(OSError):
            if _is_open(run.lock, descriptor):  # and not that of a folder that has taken this one's name
                run.lock.unlink()
                if made:
                    run.root.rmdir()
        os.close(descriptor)


def move_aside(run: RunFolder) -> Path:
    """Give the folder of an earlier run another name, NAME.1 or the next free number, and return that.

    Raises:
        UserError: another process writes into it, or it can't be renamed.
    """
    root = run.root.resolve()
    with claimed(run):
        number = 1
        while os.path.lexists(aside := root.with_name(f"{root.name}.{number}")):
            number += 1
        try:
            os.rename(root, aside)
        except OSError as error:
            rule = f"it can't be moved aside ({error.strerror})"
            raise UserError(describe("run.dir", str(run.root), rule, "Give another folder.")) from error
    return aside


def _taken(run: RunFolder) -> int:
    """Return the descriptor of the lock's file, locked."""
    for _ in range(_TRIES):
        try:
            run.root.mkdir(parents=True, exist_ok=True)
            descriptor = _opened(run.lock)
        except OSError as error:
            rule = f"the run can't write there ({error.strerror})"
            raise UserError(describe("run.dir", str(run.root), rule, "Choose another folder.")) from error
        if descriptor is None:
            continue
        try:
            _lock(run, descriptor)
            if _is_open(run.lock, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it was removed between the two
    remedy = f"Remove {run.lock} if no run is in that folder."
    raise UserError(describe("run.dir", str(run.root), f"{run.lock.name} can't be made there", remedy))


def _opened(lock: Path) -> int | None:
    """Open the lock's file, which is made; None where whoever had it has just removed the folder."""
    try:
        return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except FileNotFoundError:
        return None


def _is_open(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to the file that is open."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock(run: RunFolder, descriptor: int) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _HELD + _NO_LOCKS:
            raise
        holder = _read(descriptor)
        if error.errno in _NO_LOCKS and not _is_alive(run.lock, holder):
            return
        who = f"process {holder.get('process', '?')} on {holder.get('host', '?')}"
        if "began" in holder:
            who += f", begun {datetime.fromtimestamp(holder['began']).isoformat(' ', 'seconds')}"
        rule = f"another run writes there ({who})"
        remedy = f"Give another run.dir or end that one; if it is gone for certain, remove {run.lock}."
        raise UserError(describe("run.dir", str(run.root), rule, remedy)) from error


def _is_alive(lock: Path, holder: dict[str, Any]) -> bool:
    if not holder:
        return False
    if holder.get("host") == socket.gethostname():
        began = _began(int(holder["process"]))
        return began is not None and abs(began - holder["began"]) < 1.0
    # Both times are the file server's, so that clocks need not agree.
    probe = lock.with_name(f"{lock.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        probe.touch()
        return probe.stat().st_mtime - lock.stat().st_mtime < _SILENT_SECONDS
    finally:
        probe.unlink(missing_ok=True)


def _began(process: int) -> float | None:
    """When a process of this machine was started; None if there is none of that number."""
    try:
        return psutil.Process(process).create_time()
    except psutil.NoSuchProcess:
        return None


def _beat(lock: Path, ended: threading.Event) -> None:
    while not ended.wait(_BEAT_SECONDS):
        try:
            now = time.time()
            os.utime(lock, (now, now))
        except OSError:
            return  # the folder is gone


def _read(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0).decode("utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _write(descriptor: int, holder: dict[str, object]) -> None:
    """Say who holds the lock; a disk without room for it takes nothing from the lock."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode("utf-8"), 0)
    except OSError:
        return
