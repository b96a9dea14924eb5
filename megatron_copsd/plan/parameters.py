"""The parameters that one rank of a pipeline stage holds, and Megatron's flat buffers of them.

The buffers follow ``_ParamAndGradBuffer`` and ``DistributedOptimizer`` of Megatron-Core without overlap: parameters in
reverse order of registration, all in one bucket, but for a tied embedding that two stages hold. With the distributed
optimizer every parameter starts at a multiple of 64 elements and every bucket ends at one of lcm(replicas, 128).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from megatron_copsd.architecture import Architecture
from megatron_copsd.config.sections.model import Projection

_PARAMETER_MULTIPLE = 64
_BUCKET_MULTIPLE = 128


@dataclass(frozen=True)
class Parameter:
    """One tensor of a rank.

    Attributes:
        elements: of this rank's shard.
        expert: reduced over the replicas of the experts, not over all data-parallel ranks.
        own_bucket: a tied embedding that first and last stage both hold, which Megatron keeps in a bucket of its own.
    """

    elements: int
    expert: bool = False
    own_bucket: bool = False


@dataclass(frozen=True)
class StagePart:
    """Which part of the model one rank of a pipeline stage holds.

    Attributes:
        layers: transformer layers of the stage, over all its virtual stages.
        first, last: whether it holds the embedding, and the final norm and output weight.
        pipeline, tensor, expert: parallel sizes.
    """

    layers: int
    first: bool
    last: bool
    pipeline: int
    tensor: int
    expert: int = 1


def stage_parameters(model: Architecture, part: StagePart) -> tuple[Parameter, ...]:
    """Return the parameters of one rank in the order in which Megatron registers them."""
    vocabulary = model.padded_vocab(part.tensor) // part.tensor * model.hidden
    twice = model.tied and part.pipeline > 1
    found: list[Parameter] = []
    if part.first:
        found.append(Parameter(vocabulary, own_bucket=twice))
    for _ in range(part.layers):
        found += _layer(model, part.tensor, part.expert)
    if part.last:
        found.append(Parameter(model.hidden))
        if not model.tied or part.pipeline > 1:
            found.append(Parameter(vocabulary, own_bucket=twice))
    return tuple(found)


def _layer(model: Architecture, tensor: int, expert: int) -> list[Parameter]:
    hidden, query = model.hidden, model.query_width // tensor
    qkv = (model.query_width + 2 * model.kv_width) // tensor
    layer = [Parameter(hidden), Parameter(hidden * query), Parameter(hidden * qkv)]
    layer += [Parameter(qkv)] if model.qkv_bias else []
    layer += [Parameter(model.head_dim)] * 2 if model.qk_norm else []
    layer.append(Parameter(hidden))
    if not model.experts:
        width = model.ffn // tensor
        return [*layer, Parameter(2 * width * hidden), Parameter(width * hidden)]
    width, own = model.moe_ffn, model.experts // expert
    layer.append(Parameter(model.experts * hidden))  # the router, on every rank
    layer += [Parameter(2 * width * hidden, expert=True)] * own
    return [*layer, *[Parameter(width * hidden, expert=True)] * own]


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters that are trained in place of the model.

    Attributes:
        rank: of the matrices A [rank, in] and B [out, rank] of each projection.
        targets: adapted projections, as Hugging Face names them.
    """

    rank: int
    targets: tuple[str, ...] = get_args(Projection)


def adapter_parameters(model: Architecture, part: StagePart, adapters: Adapters) -> tuple[Parameter, ...]:
    """Return the adapters of one rank: of A and B the one on the cut side of its layer is cut, the other is whole.

    Experts get none.
    """
    hidden, tensor, rank = model.hidden, part.tensor, adapters.rank
    outputs = {"q_proj": model.query_width, "k_proj": model.kv_width, "v_proj": model.kv_width}
    layer: list[Parameter] = []
    for target in adapters.targets:
        if target in outputs:
            layer += [Parameter(rank * hidden), Parameter(outputs[target] // tensor * rank)]
        elif target == "o_proj":
            layer += [Parameter(rank * model.query_width // tensor), Parameter(hidden * rank)]
        elif not model.experts:
            layer += [Parameter(rank * hidden), Parameter(model.ffn // tensor * rank)]
    return tuple(layer) * part.layers


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
