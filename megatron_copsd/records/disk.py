"""Writing into a run's folder: whole files or none, and one clear error where the disk takes no more."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from megatron_copsd.errors import UserError, describe

_PROBE_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ROOM, _WAY = "Make room", "Clear the way"
_CONTINUES = "start the same command again: it continues"


@contextmanager
def writing(path: Path, then: str = _CONTINUES) -> Iterator[None]:
    """Turn what the file system refuses, while ``path`` is written, into an error that names it.

    Args:
        path: what is written.
        then: what the user can do when that is possible again.

    Raises:
        UserError: the disk is full, read-only or gone.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        refused = refused_by_disk(error)
        if refused is None:
            raise
        raise UserError(
            describe(str(path), path.name, refused_rule(path, refused), remedy_for(refused, then))
        ) from error


def refused_by_disk(error: BaseException) -> OSError | None:
    """Return the file system's refusal behind an exception, which libraries may have wrapped; None if it is not one."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or one in seen:
            continue
        seen.append(one)
        if isinstance(one, OSError) and one.errno is not None:
            return one
        for code in _FULL:
            # Written by other processes, of which only a text comes back.
            if os.strerror(code) in str(one):
                return OSError(code, os.strerror(code))
        waiting += [one.__cause__, one.__context__, *(x for x in one.args if isinstance(x, BaseException))]
    return None


def refuses_more(folder: Path) -> OSError | None:
    """Try whether a file of some size can still be written into a folder; returns the refusal, or None."""
    probe = folder / f"probe.{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    finally:
        with suppress(OSError):
            probe.unlink()
    return None


def refused_rule(path: Path, refused: OSError) -> str:
    """Say what the file system refused, and how much room it has left."""
    here = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
    free = f"; {shutil.disk_usage(here).free / 1e6:,.1f} MB are free there" if refused.errno in _FULL else ""
    return f"it can't be written ({refused.strerror}{free})"


def remedy_for(refused: OSError, then: str = _CONTINUES) -> str:
    """Say what to do about a refusal, while a run is written if not said otherwise."""
    return f"{_ROOM if refused.errno in _FULL else _WAY}, then {then}."


@contextmanager
def replacing(path: Path, then: str = _CONTINUES) -> Iterator[Path]:
    """Have a file be whole at every moment, the one of before or the new one: yields the name to write the new one to.

    Raises:
        UserError: see ``writing``; the file is as before.
    """
    partial = path.with_name(f"{path.name}.partial")
    with writing(path, then):
        try:
            yield partial
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def appending(path: Path, then: str = _CONTINUES) -> Iterator[TextIO]:
    """Add to a text file, whole or not at all; what was added is on the disk at the end, line ends as they are given.

    Raises:
        UserError: see ``writing``; the file ends as it did.
    """
    with writing(path, then):
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", newline="", encoding="utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            if path.exists():
                os.truncate(path, size)
            raise


def read_text(path: Path) -> str:
    """Read a text file; a pipe or a device, which could be read for ever, is none.

    Raises:
        OSError: it is not there, can't be read, or is no regular file.
        UnicodeDecodeError: it is not UTF-8.
    """
    _refuse_endless(path)
    return path.read_text(encoding="utf-8")


def read_bytes(path: Path) -> bytes:
    """Read a file as ``read_text`` does a text file.

    Raises:
        OSError: it is not there, can't be read, or is no regular file.
    """
    _refuse_endless(path)
    return path.read_bytes()


def _refuse_endless(path: Path) -> None:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))


def replace_text(path: Path, text: str, then: str = _CONTINUES) -> None:
    """Write a text file as ``replacing`` does.

    Raises:
        UserError: see ``writing``; the file is as before.
    """
    with replacing(path, then) as partial:
        partial.write_text(text, encoding="utf-8")
