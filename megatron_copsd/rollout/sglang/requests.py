"""Spreading requests over servers: the least loaded first, each again where it was lost, what is finished kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

from megatron_copsd.rollout.engine import Request, Sampling
from megatron_copsd.rollout.sglang.client import Answer, ServerLost, SglangClient

_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 8.0


@dataclass
class Answers:
    """What has come back of some requests.

    Attributes:
        found: by index of the request.
        lost: why the others have not.
    """

    found: dict[int, Answer] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)

    def drop_unsynced(self) -> None:
        """Count answers as lost that a server gave with the weights it was started with, before it was given any."""
        for index, answer in list(self.found.items()):
            if answer.versions[0].version < 0:
                del self.found[index]
                self.lost[index] = "a server was started again by somebody and answered before it had the weights"


class RequestPool:
    """Sends requests to the servers that are there, several at a time."""

    def __init__(self, clients: Sequence[SglangClient], concurrency: int, attempts: int) -> None:
        """At most ``concurrency`` requests a server at once, each sent at most ``attempts`` times."""
        self._load = dict.fromkeys(clients, 0)
        self._failing: set[SglangClient] = set()
        self._in_vain = False  # a request was lost for good, and none has been answered since
        self._lock = threading.Lock()
        self._workers = concurrency * len(clients)
        self._attempts = attempts

    def run(self, requests: Sequence[Request], sampling: Sampling, answers: Answers) -> None:
        """Send every request that has no answer yet; those that stay lost are named in ``answers``.

        Raises:
            UserError: a request is refused; the others are not waited for.
        """
        pending = [index for index in range(len(requests)) if index not in answers.found]
        answers.lost.clear()
        pool = ThreadPoolExecutor(max_workers=max(1, min(self._workers, len(pending))))
        futures = {pool.submit(self._send, requests[index], sampling): index for index in pending}
        try:
            for future in as_completed(futures):
                index = futures[future]
                try:
                    answers.found[index] = future.result()
                except ServerLost as error:
                    answers.lost[index] = str(error)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _send(self, request: Request, sampling: Sampling) -> Answer:
        pause = _FIRST_PAUSE_SECONDS
        for attempt in range(1, self._attempts + 1):
            client = self._least_loaded()
            try:
                answer = client.generate(request, sampling)
            except ServerLost:
                self._done(client, lost=True)
                if attempt == self._attempts or self._in_vain:
                    self._in_vain = True
                    raise
            else:
                self._done(client, lost=False)
                self._in_vain = False
                return answer
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        raise AssertionError("a loop of at least one attempt returns or raises")

    def _least_loaded(self) -> SglangClient:
        """Servers that lost their last request come last, however idle they are."""
        with self._lock:
            client = min(self._load, key=lambda client: (client in self._failing, self._load[client]))
            self._load[client] += 1
            return client

    def _done(self, client: SglangClient, *, lost: bool) -> None:
        with self._lock:
            self._load[client] -= 1
            (self._failing.add if lost else self._failing.discard)(client)
