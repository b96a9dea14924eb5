"""Where a step's responses come from, and when the engine is asked for them and given new weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from megatron_copsd.config.schema import Config
from megatron_copsd.data.subsets import TrainItem
from megatron_copsd.rollout.collect import rollout_seed
from megatron_copsd.rollout.engine import Request, RolloutEngine, Sampling
from megatron_copsd.types import PromptPair, Rollout

Draw = Callable[[int], Sequence[TrainItem]]
"""Returns the problems of a step from the number of steps done before it."""

Push = Callable[[int], None]
"""Gives the engine the trainer's current weights under this version, unless it has them; collective."""

Responses = tuple[Sequence[PromptPair], Sequence[Rollout]]
"""Prompts, each as often as it has responses, and one response each; the same on every process."""


class ResponseSource(Protocol):
    """Gives every step its responses. Every process of the run calls every method."""

    def take(self, done: int) -> Responses:
        """Return the responses of the step after ``done``; each step is taken once, in order.

        Collectives: those of the engine.
        """
        ...

    def free_engine(self, done: int) -> None:
        """Leave the engine free for other requests, under the trainer's current weights, whose version is ``done``.

        Collectives: those of the engine.
        """
        ...


class ReferenceResponses:
    """The reference solutions of the data; implements ``ResponseSource``."""

    def __init__(self, draw: Draw, push: Push) -> None:
        self._draw, self._push = draw, push

    def take(self, done: int) -> Responses:
        """See ``ResponseSource``."""
        pairs, references = zip(*self._draw(done), strict=True)
        return pairs, references

    def free_engine(self, done: int) -> None:
        """See ``ResponseSource``."""
        self._push(done)


class RolloutSchedule:
    """Responses that the engine samples; implements ``ResponseSource``.

    Under ``rollout.ahead`` those of a step are begun a step before, and are sampled while that one trains. With
    ``sglang.pause`` other than ``wait`` the newest weights reach even responses that are being sampled.
    """

    def __init__(
        self, engine: RolloutEngine, draw: Draw, push: Push, config: Config, stop_ids: tuple[int, ...]
    ) -> None:
        """Ask for nothing yet.

        Args:
            engine: samples.
            draw: gives the problems of a step.
            push: gives the engine the trainer's weights.
            config: how to sample, and when.
            stop_ids: token ids that end a response.
        """
        rollout = config.rollout
        self._engine, self._draw, self._push = engine, draw, push
        self._sampling = Sampling(
            rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_response_tokens, stop_ids
        )
        self._samples_per_prompt, self._seed = rollout.samples_per_prompt, config.run.seed
        self._ahead, self._steps = rollout.ahead, config.run.steps
        self._reaches_running = config.sglang.pause != "wait"
        # What was begun and not taken yet: whose responses, their prompts and, once waited for, the responses.
        self._step: int | None = None
        self._pairs: Sequence[PromptPair] = ()
        self._rollouts: list[Rollout] = []

    def take(self, done: int) -> Responses:
        """See ``ResponseSource``; the engine then gives up what the training pass can use."""
        if self._step != done:
            self._begin(done, weight_version=done)
        elif self._reaches_running:
            self._push(done)
        self._wait(done)
        taken = self._pairs, self._rollouts
        self._step, self._pairs, self._rollouts = None, (), []
        if self._ahead and done + 1 < self._steps:
            self._begin(done + 1, weight_version=done)
        self._engine.rest()
        return taken

    def free_engine(self, done: int) -> None:
        """See ``ResponseSource``."""
        if self._reaches_running:
            self._push(done)
        self._wait(done)
        self._push(done)

    def _begin(self, step: int, weight_version: int) -> None:
        self._push(weight_version)
        pairs = [pair for pair, _ in self._draw(step) for _ in range(self._samples_per_prompt)]
        requests = [
            Request(pair.student_prompt, rollout_seed(self._seed, step, index)) for index, pair in enumerate(pairs)
        ]
        self._engine.begin(requests, self._sampling)
        self._step, self._pairs = step, pairs

    def _wait(self, done: int) -> None:
        if self._step is not None and not self._rollouts:
            self._rollouts = self._engine.finish(weight_version=done)
