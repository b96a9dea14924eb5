"""What a command is to write, looked at before it works: a file or a folder that can't be made is told at once."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from megatron_copsd.config.paths import reason
from megatron_copsd.errors import UserError, describe

_REMEDY = "Choose another place."


def check_new_file(path: Path, option: str) -> None:
    """Refuse a file that could not be written, or that is something else than a file; folders above it must be there.

    Raises:
        UserError: as said.
    """
    mode = _mode(path, option)
    if mode is None:
        _check_parent(path, path.parent, option)
    elif not stat.S_ISREG(mode):
        rule = "is a folder" if stat.S_ISDIR(mode) else "is no regular file"
        raise UserError(describe(option, str(path), rule, "Name a file."))
    elif not os.access(path, os.W_OK):
        raise UserError(describe(option, str(path), "may not be written", _REMEDY))


def check_file_and_parents(path: Path, option: str) -> None:
    """Refuse a file as ``check_new_file`` does, where the command makes the folders above it.

    Raises:
        UserError: as said.
    """
    if _mode(path, option) is None:
        _check_parent(path, _nearest(path.parent, option), option)
    else:
        check_new_file(path, option)


def check_folder(path: Path, option: str) -> None:
    """Refuse a folder that could not be written into, or be made with all those above it.

    Raises:
        UserError: as said.
    """
    if _mode(path, option) is None:
        _check_parent(path, _nearest(path.parent, option), option)
    else:
        _check_parent(path, path, option)


def _mode(path: Path, option: str) -> int | None:
    """What is there; None if nothing is."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        if not os.path.islink(path):
            return None
        raise UserError(describe(option, str(path), "is a link to nothing", "Remove it.")) from None
    except OSError as error:
        raise UserError(describe(option, str(path), reason(error), _REMEDY)) from None


def _nearest(folder: Path, option: str) -> Path:
    return next(parent for parent in (folder, *folder.parents) if _mode(parent, option) is not None)


def _check_parent(path: Path, folder: Path, option: str) -> None:
    mode = _mode(folder, option)
    named = "" if folder == path else f" ({folder})"
    if mode is None:
        rule = f"the folder it is to stand in is not there{named}"
    elif not stat.S_ISDIR(mode):
        rule = f"what it is to stand in is no folder{named}" if named else "is no folder"
    elif not os.access(folder, os.W_OK | os.X_OK):
        rule = f"nothing can be written there{named}"
    else:
        return
    raise UserError(describe(option, str(path), rule, _REMEDY))
