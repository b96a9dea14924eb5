"""Ports of this machine for servers that must be told theirs: kept until the server has it, and who has it then."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
_LOCAL, _STATE, _INODE = 1, 3, 9  # columns
_LISTENING = "0A"


def reserve_port(host: str) -> socket.socket:
    """Take a free port until the returned socket is closed: the system gives it to nobody who asks for any port.

    A server that is told the number can listen on it all the same, as it says SO_REUSEADDR, and so does this socket,
    which itself never listens.
    """
    reservation = socket.socket()
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.bind((host, 0))
    return reservation


def is_free(host: str, port: int) -> bool:
    """Whether nothing listens on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed server's port may linger
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def listens(leader: int, port: int) -> bool:
    """Whether it is a process of the process group that ``leader`` leads that listens on a port, at any address."""
    sockets = {f"socket:[{inode}]" for inode in _listeners(port)}
    for process in Path("/proc").iterdir():
        with suppress(ValueError, OSError):  # no process, or one that has just ended
            if os.getpgid(int(process.name)) == leader and sockets & _open_files(process):
                return True
    return False


def address_towards(host: str, port: int) -> str:
    """Address at which ``host`` reaches this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        address: str = probe.getsockname()[0]
        return address


def _listeners(port: int) -> set[str]:
    found = set()
    for table in _TABLES:
        with suppress(FileNotFoundError):  # a machine without IPv6
            for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                columns = line.split()
                if columns[_STATE] == _LISTENING and int(columns[_LOCAL].rpartition(":")[2], 16) == port:
                    found.add(columns[_INODE])
    return found


def _open_files(process: Path) -> set[str]:
    found = set()
    for descriptor in (process / "fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.add(os.readlink(descriptor))
    return found
