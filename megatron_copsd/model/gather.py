"""A sharded Megatron model as full HF tensors, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from megatron_copsd.architecture import Architecture
from megatron_copsd.hf.cuts import unshard
from megatron_copsd.hf.names import NameTable, Rule
from megatron_copsd.model.lora import effective_weights


def iter_hf_tensors(
    chunks: Sequence[GPTModel],
    architecture: Architecture,
    tensor_group: dist.ProcessGroup,
    pipeline_group: dist.ProcessGroup,
    expert_group: dist.ProcessGroup,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every HF tensor of the model under its HF name, in the same order on every rank.

    At most one parameter is held whole at a time, of experts one of each expert-parallel rank; adapters come merged
    into the weights that they stand beside.

    Collectives: per parameter, an all-gather over ``tensor_group`` (an expert's: over ``expert_group``) on the stage
    that owns it and a broadcast over ``pipeline_group``; every rank must exhaust the iterator.
    """
    table = NameTable(architecture)
    own = effective_weights(chunks)
    stage = dist.get_rank(pipeline_group)
    stages: list[list[str]] = [[] for _ in range(dist.get_world_size(pipeline_group))]
    dist.all_gather_object(stages, list(own), group=pipeline_group)
    done: set[str] = set()
    for owner, names in enumerate(stages):
        for name in names:
            rules = _rules(table, name, architecture, dist.get_world_size(expert_group))
            hf_names = [hf for rule in rules for hf in rule.hf]
            if done.issuperset(hf_names):
                continue  # the last stage's copy of a tied embedding
            done.update(hf_names)
            tensors: tuple[torch.Tensor, ...] | None = None
            if owner == stage and rules[0].expert:
                experts = zip(rules, _gather(own[name](), expert_group), strict=True)
                tensors = tuple(t for rule, expert in experts for t in unshard(rule.cut, [expert], architecture))
            elif owner == stage:
                group = None if rules[0].cut == "replicated" else tensor_group
                tensors = unshard(rules[0].cut, _gather(own[name](), group), architecture)
            yield from zip(hf_names, _broadcast(tensors, owner, pipeline_group), strict=True)


def _rules(table: NameTable, name: str, architecture: Architecture, expert_ranks: int) -> list[Rule]:
    """Return a parameter's rule, or one for each expert-parallel rank: each has another expert under that name."""
    rule = table.rule(name)
    if not rule.expert:
        return [rule]
    return [table.rule(name, rank * architecture.experts // expert_ranks) for rank in range(expert_ranks)]


def _gather(shard: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    if group is None or dist.get_world_size(group) == 1:
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
    header: list[Any] = [None if tensors is None else [(tuple(t.shape), t.dtype) for t in tensors]]
    dist.broadcast_object_list(header, src=source, group=group)
    if tensors is None:
        # Devices are numbered alike on every node, but only this rank knows its own.
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        tensors = tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in header[0])
    tensors = tuple(tensor.contiguous() for tensor in tensors)
    for tensor in tensors:
        dist.broadcast(tensor, src=source, group=group)
    return tensors
