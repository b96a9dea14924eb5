"""Rollouts from SGLang servers: the trainer's main process speaks to them, all processes learn what they said.

A server that dies costs what it was working on. Its requests are sent again elsewhere; where no server is left, those
of ours are started anew (those of others are waited for), given the weights again, and asked only for what is missing.

The processes meet in a Gloo group of the engine's own: on GPUs the others would otherwise wait for the main process in
a kernel that keeps their devices busy, and no longer than training's collectives may take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_copsd.errors import UserError, describe
from megatron_copsd.rollout.engine import Bucket, Probe, ProbeSource, Request, Sampling, WeightSource
from megatron_copsd.rollout.sglang.client import Answer, ServerLost, SglangClient
from megatron_copsd.rollout.sglang.fleet import Fleet, gather
from megatron_copsd.rollout.sglang.requests import Answers, RequestPool
from megatron_copsd.types import FinishReason, Rollout, VersionSpan

_POLL_SECONDS = 1.0
_PAUSE_SECONDS = 30.0
_FLUSH_SECONDS = 30  # a server that has just answered its last request may need a moment until it can

Value = TypeVar("Value")


class Transport(Protocol):
    """Brings weights to servers; lives in the trainer's main process."""

    def push(
        self,
        buckets: Iterator[Bucket],
        weight_version: int,
        clients: Sequence[SglangClient],
        *,
        flush_cache: bool = True,
    ) -> None:
        """Give every server all weights, under the label ``weight_version``.

        ``flush_cache`` has servers forget the keys and values of the old weights, of which nothing may be in use.

        Raises:
            ServerLost: a server went away; it has old weights, new ones, or both.
            UserError: a server or the machine refuses.
        """
        ...

    def close(self) -> None:
        """Give back files, groups, memory."""
        ...


class Verifier(Protocol):
    """Finds out whether servers hold what was pushed; lives in the trainer's main process."""

    def watch(self, buckets: Iterator[Bucket], probes: Sequence[Probe]) -> Iterator[Bucket]:
        """Pass a push's buckets on, and remember what these weights are, or what they say of ``probes``."""
        ...

    def difference(self, client: SglangClient) -> str | None:
        """Return what a server holds that was not pushed last; None if nothing.

        Raises:
            ServerLost: a server went away.
        """
        ...


@dataclass(frozen=True)
class EngineOptions:
    """Limits of patience.

    Attributes:
        concurrency: requests at a server at once.
        attempts: times that a request, a weight sync or a lost set of servers is tried.
        start_seconds: for a server to become ready.
        pause: how a weight sync treats responses that are being sampled (``sglang.pause``).
        release_memory: have servers give up their device memory between rollouts, for a trainer on the same devices.
    """

    concurrency: int
    attempts: int
    start_seconds: float
    pause: Literal["wait", "retract", "in_place"] = "wait"
    release_memory: bool = False


class SglangEngine:
    """Implements ``RolloutEngine`` over servers; every process of the run has one, the main process's does the work."""

    def __init__(
        self,
        clients: Sequence[SglangClient],
        fleet: Fleet | None,
        transport: Transport | None,
        tokenizer: PreTrainedTokenizerBase,
        options: EngineOptions,
        group: dist.ProcessGroup | None = None,
        verifier: Verifier | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Take servers that are ready.

        Args:
            clients: one a server; empty on processes other than the main one.
            fleet: the servers, in the order of ``clients``; None where they are others'.
            transport: None on processes other than the main one.
            tokenizer: decodes responses for people.
            options: limits of patience.
            group: Gloo group of all processes, whose time-out is longer than any wait for a server.
            verifier: looks at the servers after every push; None on processes other than the main one, or not to look.
            say: tells people what was lost and what is done about it; None on processes other than the main one.
        """
        self._clients, self.fleet, self.transport = list(clients), fleet, transport
        self.verifier = verifier
        self._say = say or (lambda text: None)
        self._tokenizer = tokenizer
        self._options = options
        self._version: int | None = None
        self._source: WeightSource | None = None
        self._probes: ProbeSource | None = None
        self._begun: tuple[Sequence[Request], Sampling, Answers] | None = None
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._running: Future[None] | None = None
        self._group = group
        self._paused: set[SglangClient] = set()  # main process: those that hold what they are sampling
        self._released: list[SglangClient] = []  # main process: those that have given up their memory
        self._weights_gone = False

    @property
    def weight_version(self) -> int | None:
        """Version of the weights that the servers have; None before the first update."""
        return self._version

    @property
    def clients(self) -> Sequence[SglangClient]:
        """The servers as this process reaches them; none but on the main process."""
        return self._clients

    def update_weights(self, source: WeightSource, weight_version: int, probes: ProbeSource | None = None) -> None:
        """Bring the weights to all servers; requests that are running finish before, or are interrupted for it.

        Collectives: those of ``source`` and ``probes``, and a broadcast of the outcome; again for each repetition.

        Raises:
            UserError: a server refuses, is lost time and again, or holds other weights than it was sent.
        """
        if self._options.pause == "wait":
            self._join_running()
        self._source, self._probes = source, probes
        made = probes() if probes is not None else ()  # while the devices' memory is the trainer's
        try:
            for attempt in range(1, self._options.attempts + 1):
                lost = self._resume_memory() or self._push(source, weight_version, made)
                if lost is None:
                    self._version, self._weights_gone = weight_version, False
                    return
                if attempt < self._options.attempts:
                    self._revive(lost)
            assert lost is not None
            raise UserError(describe("weight sync", weight_version, lost, "See the logs of the servers."))
        finally:
            self._go_on()

    def begin(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Start sampling in the background.

        Collectives: a weight sync, where the servers' weights went with the memory that they gave up.
        """
        assert self._version is not None, "begin before the first weight sync"
        assert self._source is not None
        assert self._begun is None, "begin twice without finish"
        if self._weights_gone:
            self.update_weights(self._source, self._version, self._probes)
        answers = Answers()
        self._begun = requests, sampling, answers
        self._send(requests, sampling, answers)

    def finish(self, weight_version: int) -> list[Rollout]:
        """Wait for all responses, whatever servers die meanwhile; what is asked again has ``weight_version``.

        Collectives: a broadcast of the outcome and of the rollouts; a weight sync for each time servers were lost.

        Raises:
            UserError: a request is refused, or servers are lost time and again.
        """
        assert self._begun is not None, "finish before begin"
        requests, sampling, answers = self._begun
        for attempt in range(1, self._options.attempts + 1):
            with self.fleet.watched() if self.fleet else nullcontext():
                self._join_running()
                answers.drop_unsynced()
                lost = self._from_main(lambda: next(iter(answers.lost.values()), None))
            if lost is None:
                break
            if attempt == self._options.attempts:
                raise UserError(describe("rollout", f"{len(requests)} requests", lost, "See the logs of the servers."))
            self._revive(lost)
            assert self._source is not None
            self.update_weights(self._source, weight_version, self._probes)
            self._send(requests, sampling, answers)
        self._begun = None
        if self._options.pause == "in_place":
            for client in self._clients:
                try:
                    self._flush_cache(client)
                except (ServerLost, UserError) as error:
                    self._say(f"warning: a server may use keys and values of earlier weights: {error}")
        found = self._from_main(lambda: [answers.found[index] for index in range(len(requests))])
        return [self._rollout(answer) for answer in found]

    def rest(self) -> None:
        """Have the servers give up their devices' memory, weights included, if they share them with the trainer.

        Collectives: an all-gather, so that nobody needs the memory before it is there.
        """
        if not self._options.release_memory or self._weights_gone:
            return
        assert self._begun is None, "memory is given up while responses are sampled"
        self._weights_gone = True
        for client in self._clients:
            try:
                self._flush_cache(client)  # waits for what it may still have in its hands: it must have nothing
                client.call("/release_memory_occupation", {})
            except (ServerLost, UserError) as error:  # one that is lost is missed at the next weight sync
                self._say(f"warning: a server keeps its memory: {error}")
            else:
                self._released.append(client)
        gather(None, self._group)

    def close(self) -> None:
        """Stop our servers and drop all connections."""
        if self.transport is not None:
            self.transport.close()
        for client in self._clients:
            client.close()
        if self.fleet is not None:
            self.fleet.stop()
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _send(self, requests: Sequence[Request], sampling: Sampling, answers: Answers) -> None:
        """Main process: ask for what ``answers`` does not have yet, in the background."""
        if self._clients:
            pool = RequestPool(self._clients, self._options.concurrency, self._options.attempts)
            self._running = self._worker.submit(pool.run, requests, sampling, answers)

    def _join_running(self) -> None:
        """Main process: wait for the background."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _flush_cache(self, client: SglangClient) -> None:
        """Have a server forget all keys and values, as soon as it is idle."""
        client.call(f"/flush_cache?timeout={_FLUSH_SECONDS}", {}, _FLUSH_SECONDS + _POLL_SECONDS)

    def _pause(self) -> None:
        """Main process: have the servers hold what they are sampling; those that hold it already do not mind."""
        if self._running is None:
            return
        with ThreadPoolExecutor(max_workers=len(self._clients)) as pool:
            body = {"mode": self._options.pause}
            calls = [pool.submit(client.call, "/pause_generation", body, _PAUSE_SECONDS) for client in self._clients]
        for client, call in zip(self._clients, calls, strict=True):
            with suppress(ServerLost):  # the push finds out
                call.result()
                self._paused.add(client)

    def _go_on(self) -> None:
        """Main process: have the servers go on with what they hold."""
        paused, self._paused = self._paused, set()
        for client in paused.intersection(self._clients):  # one that was started again is at another address
            with suppress(ServerLost):  # its requests are lost, and asked again
                client.call("/continue_generation", {}, _PAUSE_SECONDS)

    def _resume_memory(self) -> str | None:
        """Have the servers take the memory again that they gave up; returns on every process why one did not, or None.

        Collectives: an all-gather and a broadcast, where memory was given up.
        """
        if not self._weights_gone:
            return None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what torch keeps for later is what the servers need
        gather(None, self._group)
        return self._from_main(self._wake)

    def _wake(self) -> str | None:
        """Main process: ``_resume_memory`` itself; a server that was started anew never gave any up."""
        lost = None
        asleep = [client for client in self._released if client in self._clients]
        self._released = []
        with ThreadPoolExecutor(max_workers=max(1, len(asleep))) as pool:
            calls = [pool.submit(client.call, "/resume_memory_occupation", {}) for client in asleep]
            for client, call in zip(asleep, calls, strict=True):
                try:
                    call.result()
                except ServerLost as error:
                    lost = str(error)
                    self._released.append(client)
        return lost

    def _push(self, source: WeightSource, weight_version: int, probes: Sequence[Probe]) -> str | None:
        """Push once, and verify; returns on every process why it failed, or None."""
        lost = None
        self._pause()
        buckets = source()
        if self.verifier is not None:
            buckets = self.verifier.watch(buckets, probes)
        if self.transport is not None:
            try:
                keeps = self._running is not None and self._options.pause == "in_place"
                self.transport.push(buckets, weight_version, self._clients, flush_cache=not keeps)
            except ServerLost as error:
                lost = str(error)
        for _ in buckets:
            pass  # gathering is collective: what the transport did not take, or another process takes, is still made
        return self._from_main(lambda: lost or self._difference())

    def _difference(self) -> str | None:
        """Main process: the first server's difference from what was pushed, or None."""
        if self.verifier is None:
            return None
        try:
            with ThreadPoolExecutor(max_workers=len(self._clients)) as pool:
                return next(filter(None, pool.map(self.verifier.difference, self._clients)), None)
        except ServerLost as error:
            return str(error)

    def _revive(self, lost: str) -> None:
        """Every process: have ours that died started again; the main process: wait for what is others'."""
        started = time.monotonic()
        if self.fleet is not None:
            silent = self._from_main(self._silent)
            self._say(f"{lost}; " + (f"starting {len(silent)} server(s) again" if silent else "trying again"))
            urls = self.fleet.restart(silent, self._options.start_seconds)
            for number, old in enumerate(self._clients):
                if number in silent:  # a server that was started again listens at another address
                    self._clients[number] = old.at(urls[number])
                    if self._running is None:  # else its requests find out for themselves
                        old.close()
        elif self._clients:
            self._say(f"{lost}; waiting for {', '.join(client.url for client in self._clients)}")
        deadline = time.monotonic() + self._options.start_seconds
        for client in self._clients:
            while not self._lives(client):
                if time.monotonic() > deadline:
                    rule = f"was lost ({lost}) and not ready again within {self._options.start_seconds:g} s"
                    raise UserError(describe("sglang", client.url, rule, "Start it again, or remove it."))
                time.sleep(_POLL_SECONDS)
        self._say(f"all servers are there after {time.monotonic() - started:.0f} s")

    def _silent(self) -> list[int]:
        """Main process: which of the servers do nothing any more."""
        with ThreadPoolExecutor(max_workers=len(self._clients)) as pool:
            found = list(pool.map(self._lives, self._clients))
        return [number for number, lives in enumerate(found) if not lives]

    def _lives(self, client: SglangClient) -> bool:
        """Whether a server takes requests, or would if it were not paused, and its scheduler does something."""
        return (client in self._paused or client.is_ready()) and client.answers()

    def _rollout(self, answer: Answer) -> Rollout:
        text = self._tokenizer.decode(answer.response, skip_special_tokens=True)
        versions: tuple[VersionSpan, ...] = answer.versions
        reason: FinishReason = "stop" if answer.finish_reason == "stop" else "length"
        return Rollout(answer.response, answer.token_log_probs, reason, versions[-1].version, text, versions)

    def _from_main(self, make: Callable[[], Value]) -> Value:
        """What the main process makes, on every process.

        Collectives: a broadcast of a Python object.
        """
        if dist.get_world_size() == 1:
            return make()
        box: list[Any] = [make() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return cast("Value", box[0])
