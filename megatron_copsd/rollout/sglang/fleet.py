"""The servers that a run starts: some on each of its nodes, looked after together.

The first process of each node owns that node's servers; all processes know how many there are and where. A server that
is lost is started again by its owner, when all processes meet.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from megatron_copsd.errors import UserError
from megatron_copsd.rollout.sglang.process import SglangServer, start_all, stop_all

# A server that says so often in a row, this far apart, that it is not ready hangs, and is killed.
_WATCH_SECONDS = 5.0
_SILENCES = 3

Value = TypeVar("Value")


class Fleet:
    """Servers of all nodes in one order: by the rank of their owner, then as that one has them."""

    def __init__(self, own: Sequence[SglangServer], group: dist.ProcessGroup | None) -> None:
        """Take this process's servers, not started yet, and the group of all processes.

        Collectives: an all-gather of Python objects; every process must call it.
        """
        self.own = list(own)
        self._group = group
        counts = gather(len(self.own), group)
        rank = dist.get_rank()
        self._first = sum(counts[:rank])
        self.nodes = sum(count > 0 for count in counts)
        self.restarts = 0

    def start(self, seconds: float) -> list[str]:
        """Start all servers and wait for them; returns their addresses.

        Collectives: an all-gather of Python objects.

        Raises:
            UserError: on every process, where one did not become ready; what was started is stopped.
        """
        return self._start(self.own, seconds)

    def restart(self, lost: Sequence[int], seconds: float) -> list[str]:
        """Start the servers of these numbers again; returns the addresses of all. Otherwise as ``start``."""
        own = [server for number, server in enumerate(self.own, self._first) if number in lost]
        for server in own:
            server.kill()
        self.restarts += len(lost)
        return self._start(own, seconds)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Meanwhile, end those of this process's servers that hang: somebody waits for their answers."""
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(over,), name="watch of SGLang servers", daemon=True)
        watch.start()
        try:
            yield
        finally:
            over.set()
            watch.join()

    def stop(self) -> None:
        """Stop this process's servers."""
        stop_all(self.own)

    def _start(self, servers: Sequence[SglangServer], seconds: float) -> list[str]:
        complaint = None
        try:
            start_all(servers, seconds)
        except (UserError, OSError) as error:
            complaint = str(error)
        found = gather(([server.url for server in self.own], complaint), self._group)
        complaints = [text for _, text in found if text is not None]
        if complaints:
            self.stop()
            raise UserError("\n".join(complaints))
        return [url for urls, _ in found for url in urls]

    def _watch(self, over: threading.Event) -> None:
        for server in self.own:
            threading.Thread(target=self._end_if_it_hangs, args=(server, over), daemon=True).start()
        silences = dict.fromkeys(self.own, 0)
        while not over.wait(_WATCH_SECONDS):
            for server in self.own:
                silences[server] = silences[server] + 1 if server.is_alive and not server.is_ready() else 0
                if silences[server] >= _SILENCES:
                    server.kill()

    def _end_if_it_hangs(self, server: SglangServer, over: threading.Event) -> None:
        """Ask the server's scheduler from time to time: the main process may be ready and wait for it in vain."""
        while not over.wait(_WATCH_SECONDS):
            if server.is_alive and server.hangs() and not over.is_set():
                server.kill()


def gather(value: Value, group: dist.ProcessGroup | None) -> list[Value]:
    """What every process brings, on every process, in the order of their ranks.

    Collectives: an all-gather of Python objects.
    """
    found: list[Value] = [value] * dist.get_world_size(group)
    if len(found) > 1:
        dist.all_gather_object(found, value, group=group)
    return found
