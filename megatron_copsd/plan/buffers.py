"""Megatron's flat parameter and gradient buffers, and which part of them each replica updates.

The rules are those of ``_ParamAndGradBuffer`` and ``DistributedOptimizer`` of Megatron-Core without overlap: parameters
in reverse order of registration, all in one bucket, but for a tied embedding that two stages hold. With the distributed
optimizer every parameter starts at a multiple of 64 elements and every bucket ends at one of lcm(replicas, 128).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_copsd.plan.sizes import Parameter

_PARAMETER_MULTIPLE = 64
_BUCKET_MULTIPLE = 128


@dataclass(frozen=True)
class Buffer:
    """One buffer of a rank.

    Attributes:
        elements: of the buffer, padding included; as many of the parameters as of the gradients.
        owned: parameter elements that each replica keeps optimizer state for.
    """

    elements: int
    owned: tuple[int, ...]


def flat_buffer(parameters: Sequence[Parameter], replicas: int, distributed: bool) -> Buffer:
    """Lay parameters out in a buffer.

    Args:
        parameters: of one rank, in order of registration; all dense or all experts.
        replicas: ranks over which the gradients are reduced.
        distributed: whether optimizer state is sharded over them.
    """
    if not distributed:
        elements = sum(parameter.elements for parameter in parameters)
        return Buffer(elements, (elements,) * replicas)
    owned = [0] * replicas
    end = 0
    for bucket in _buckets(parameters):
        start = end
        ranges = []
        for parameter in bucket:
            first = _up(end, _PARAMETER_MULTIPLE)
            end = first + parameter.elements
            ranges.append((first, end))
        end = _up(end, math.lcm(replicas, _BUCKET_MULTIPLE))
        _share(ranges, start, (end - start) // replicas, owned)
    return Buffer(end, tuple(owned))


def _buckets(parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    buckets: list[list[Parameter]] = [[]]
    for parameter in reversed(parameters):
        if parameter.own_bucket:
            buckets += [[parameter], []]
        else:
            buckets[-1].append(parameter)
    return [bucket for bucket in buckets if bucket]


def _share(ranges: Sequence[tuple[int, int]], start: int, shard: int, owned: list[int]) -> None:
    """Add to each replica's count the elements that fall into its shard of the bucket."""
    for first, end in ranges:
        for rank in range((first - start) // shard, (end - 1 - start) // shard + 1):
            owned[rank] += min(end, start + (rank + 1) * shard) - max(first, start + rank * shard)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
