"""What the trainer asks of anything that samples responses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_copsd.types import Rollout


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: keep the smallest set of tokens with this probability; 1 is off.
        top_k: keep the k likeliest tokens; 0 is off.
        max_tokens: longest response.
        stop_ids: token ids that end a response and belong to it.
    """

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """One response to sample.

    Attributes:
        prompt: token ids.
        seed: the response depends on the weights, the prompt, the sampling and this alone, not on what else is
            sampled beside it.
    """

    prompt: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Bucket:
    """Some full weights under HF names, at most about ``rollout.bucket_mb`` of them."""

    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]


# Makes the trainer's current weights, bucket by bucket; collective, and called again where a sync has to be repeated.
WeightSource = Callable[[], Iterator[Bucket]]

# Makes token sequences, each with the log-probability (temperature 1) that the trainer's current weights give to every
# token but the first; collective, and called again likewise.
Probe = tuple[tuple[int, ...], tuple[float, ...]]
ProbeSource = Callable[[], Sequence[Probe]]


class RolloutEngine(Protocol):
    """Samples responses under the weights it was last given. Every process of the run calls every method."""

    @property
    def weight_version(self) -> int | None:
        """Version of the weights it has; None before the first update."""
        ...

    def update_weights(self, source: WeightSource, weight_version: int, probes: ProbeSource | None = None) -> None:
        """Take new weights; every rollout begun from now on carries ``weight_version``.

        An engine whose weights are elsewhere compares its log-probabilities of ``probes`` with the trainer's.
        """
        ...

    def begin(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Start sampling one response a request; an engine beside the trainer does so while the trainer goes on."""
        ...

    def finish(self, weight_version: int) -> list[Rollout]:
        """Wait for what ``begin`` started and return its rollouts in order, the same on every process.

        ``weight_version`` is that of the trainer's weights now, which may have moved on since ``begin``: an engine that
        has to be given them again samples the rest under it, and each rollout says which version made it.
        """
        ...

    def rest(self) -> None:
        """The trainer needs the devices: give up what the engine can do without until it is asked again."""
        ...

    def close(self) -> None:
        """Give back what the engine holds: processes, connections."""
        ...
