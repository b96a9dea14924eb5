"""How a run is asked to end, and how it sees to it that nothing of it is left.

The first Ctrl-C, SIGTERM or SIGHUP lets the step in hand be finished and saved; the second ends the process at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SIGNALLED = 128
"""What a shell adds to the number of the signal that ended a program."""

LAUNCHED_BY = "COPSD_LAUNCHED_BY"
"""Environment variable of the workers of a launcher that starts them through others."""

_PR_SET_PDEATHSIG = 1


class Stopped(BaseException):
    """A signal asks this process to end, at a moment when there is nothing to finish first."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        number: of the signal; 0 as long as none came.
    """

    def __init__(self, quiet: bool) -> None:
        """``quiet``: somebody else tells the user."""
        self.number = 0
        self._quiet = quiet
        self._first: str | None = None

    @contextmanager
    def after(self, first: str) -> Iterator[None]:
        """Let a signal wait: it is to be looked up in ``number``, and ``first`` says what is done before it is."""
        self._first = first
        try:
            yield
        finally:
            self._first = None

    def take(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        for each in STOPPING:
            # A second one must end even a process that waits in C for others.
            if signal.getsignal(each) == self.take:
                signal.signal(each, signal.SIG_DFL)
        self.number = number
        if self._first is None:
            raise Stopped(number)
        if not self._quiet:
            _tell(number, self._first)


def _tell(number: int, first: str) -> None:
    # print is not safe in a handler: the signal may have come while something was being printed.
    text = f"\n{signal.Signals(number).name}: {first}; a second signal ends it at once\n"
    with suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())


@contextmanager
def stop_request(quiet: bool = False) -> Iterator[StopRequest]:
    """Take the signals that ask a program to end, as long as the context lasts."""
    request = StopRequest(quiet)
    # What was started to survive its terminal, by nohup, keeps on ignoring it.
    taken = {n: signal.getsignal(n) for n in STOPPING if signal.getsignal(n) != signal.SIG_IGN}
    for number in taken:
        signal.signal(number, request.take)
    try:
        yield request
    finally:
        for number, before in taken.items():
            if signal.getsignal(number) == request.take:
                signal.signal(number, before)


@contextmanager
def passing_on(children: Callable[[], Sequence[int]], first: str) -> Iterator[StopRequest]:
    """Hand the signals that ask a program to end to the processes that do its work, and leave the rest to them.

    The children must be in sessions of their own: a terminal's Ctrl-C reaches all of its session by itself.

    Args:
        children: numbers of the processes; without any, a signal interrupts with ``Stopped``.
        first: what they finish before they end, for the user.

    Yields:
        Which signal came, as ``number``.
    """
    request = StopRequest(quiet=True)

    def take(number: int, frame: FrameType | None) -> None:
        found = children()
        second, request.number = request.number, number
        for child in found:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL if second else number)
        if second:
            os._exit(SIGNALLED + number)
        if not found:
            raise Stopped(number)
        _tell(number, first)

    taken = {n: signal.signal(n, take) for n in STOPPING if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield request
    finally:
        for number, before in taken.items():
            signal.signal(number, before)


def run_apart(command: Sequence[str], first: str) -> int:
    """Run a command to its end, in a session of its own, and hand it the signals that come; returns its exit code.

    However this process ends, the command's ends with it.
    """
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=end_with_parent)
    with passing_on(lambda: [process.pid], first) as request:
        code = process.wait()
    return SIGNALLED + request.number if request.number else code


def end_with_parent(parent: int | None = None, by: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel end this process when the one that started it ends, however that ends; on Linux only.

    Args:
        parent: its number, where it is known: it may have ended already.
        by: the signal that ends it.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_launcher() -> None:
    """Have this process end when the launcher does whose number is in ``LAUNCHED_BY``: it need not be the parent."""
    launcher = os.environ.get(LAUNCHED_BY)
    if launcher is not None:
        threading.Thread(target=_end_after, args=(int(launcher),), daemon=True).start()


def _end_after(process: int) -> None:
    with suppress(psutil.NoSuchProcess):
        psutil.Process(process).wait()
    os.kill(os.getpid(), signal.SIGKILL)


def end_forks_with_this() -> None:
    """Have processes that are forked from this one from now on, such as writers of checkpoints, end with it."""
    os.register_at_fork(after_in_child=end_with_parent)
