"""Paths as people write them: a leading ``~``, and why what is there can't be used."""

from __future__ import annotations

import errno
import os
import stat


def expanded(path: str) -> str:
    """Return a path with a leading ``~`` or ``~NAME`` in the place of which a home folder stands.

    Raises:
        ValueError: there is no such user.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ValueError(f"{path.partition('/')[0]} names no user's home folder; write ./ before a name that begins so")
    return found


def why_no_file(path: str | os.PathLike[str]) -> str | None:
    """Return why a path is no file that can be read; None where it is one. Pipes are none: reading could hang."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:
        return reason(error)
    if stat.S_ISDIR(mode):
        return "is a folder"
    if not stat.S_ISREG(mode):
        return "is no regular file"
    return None if os.access(path, os.R_OK) else "may not be read"


def reason(error: Exception) -> str:
    """Return what kept a path from being used, in a few words."""
    if isinstance(error, OSError):
        long_name = error.errno == errno.ENAMETOOLONG
        return "the name is too long" if long_name else f"can't be used: {error.strerror or error}"
    return f"can't be used: {error}"
