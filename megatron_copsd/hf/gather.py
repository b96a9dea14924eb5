"""A sharded Megatron model as full HF tensors, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from megatron_copsd.hf.architecture import Architecture
from megatron_copsd.hf.cuts import unshard
from megatron_copsd.hf.names import NameTable
from megatron_copsd.model.lora import effective_weights


def iter_hf_tensors(
    chunks: Sequence[GPTModel],
    architecture: Architecture,
    tensor_group: dist.ProcessGroup,
    pipeline_group: dist.ProcessGroup,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every HF tensor of the model under its HF name, in the same order on every rank.

    At most one parameter is held whole at a time; adapters come merged into the weights that they stand beside.

    Collectives: per parameter, an all-gather over ``tensor_group`` on the stage that owns it and a broadcast over
    ``pipeline_group``; every rank must exhaust the iterator.
    """
    table = NameTable(architecture)
    own = effective_weights(chunks)
    stage = dist.get_rank(pipeline_group)
    stages: list[list[str]] = [[] for _ in range(dist.get_world_size(pipeline_group))]
    dist.all_gather_object(stages, list(own), group=pipeline_group)
    done: set[str] = set()
    for owner, names in enumerate(stages):
        for name in names:
            rule = table.rule(name)
            if done.issuperset(rule.hf):
                continue  # the last stage's copy of a tied embedding
            done.update(rule.hf)
            tensors: tuple[torch.Tensor, ...] | None = None
            if owner == stage:
                tensors = unshard(rule.cut, _gather(own[name](), rule.cut, tensor_group), architecture)
            yield from zip(rule.hf, _broadcast(tensors, owner, pipeline_group), strict=True)


def _gather(shard: torch.Tensor, cut: str, group: dist.ProcessGroup) -> list[torch.Tensor]:
    if cut == "replicated" or dist.get_world_size(group) == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return shards


def _broadcast(
    tensors: tuple[torch.Tensor, ...] | None, owner: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, ...]:
    if dist.get_world_size(group) == 1:
        assert tensors is not None
        return tensors
    source = dist.get_global_rank(group, owner)
    header = [[(tuple(t.shape), t.dtype) for t in tensors]] if tensors is not None else [None]
    dist.broadcast_object_list(header, src=source, group=group)
    if tensors is None:
        # Devices are numbered alike on every node, but only this rank knows its own.
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        tensors = tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in header[0])
    tensors = tuple(tensor.contiguous() for tensor in tensors)
    for tensor in tensors:
        dist.broadcast(tensor, src=source, group=group)
    return tensors
