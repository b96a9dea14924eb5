"""Cutting merged HF tensors into tensor-parallel shards and putting them together again, element for element.

Layouts are those of Megatron-Core: ``linear_qkv`` interleaves by query group ([q of group 0, k 0, v 0, q of group 1,
...]), and each shard of a gated ``linear_fc1`` holds its gate rows and then its up rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_copsd.architecture import Architecture
from megatron_copsd.hf.names import Cut


def shard(cut: Cut, tensors: Sequence[torch.Tensor], architecture: Architecture, rank: int, size: int) -> torch.Tensor:
    """Return the part of the merged tensors that tensor-parallel rank ``rank`` of ``size`` holds.

    Args:
        cut: how the parameter is split.
        tensors: HF tensors of the parameter's rule, in its order, as HF stores them.
        architecture: sizes of the model.
        rank, size: of the tensor-parallel group.

    Raises:
        RuntimeError: the tensors do not have the shapes the architecture says.
    """
    if cut == "replicated":
        return tensors[0]
    if cut == "vocab":
        if tensors[0].shape[0] != architecture.vocab_size:
            raise RuntimeError(f"{tensors[0].shape[0]} rows for a vocabulary of {architecture.vocab_size}")
        rows = architecture.padded_vocab(size) // size
        part = tensors[0][rank * rows : (rank + 1) * rows]
        padding = part.new_zeros(rows - part.shape[0], part.shape[1])
        return torch.cat((part, padding)) if padding.shape[0] else part
    if cut == "row":
        return tensors[0].chunk(size, dim=1)[rank]
    if cut == "gated":
        return torch.cat([tensor.chunk(size, dim=0)[rank] for tensor in tensors])
    grouped = [_by_group(tensor, architecture).chunk(size, dim=0)[rank] for tensor in tensors]
    merged = torch.cat(grouped, dim=1)
    return merged.reshape(-1, *tensors[0].shape[1:])


def unshard(cut: Cut, shards: Sequence[torch.Tensor], architecture: Architecture) -> tuple[torch.Tensor, ...]:
    """Return the HF tensors of a parameter from the shards of all tensor-parallel ranks, in rank order.

    Args:
        cut: how the parameter is split.
        shards: one tensor a rank.
        architecture: sizes of the model.
    """
    if cut == "replicated":
        return (shards[0],)
    if cut == "vocab":
        return (torch.cat(list(shards))[: architecture.vocab_size],)
    if cut == "row":
        return (torch.cat(list(shards), dim=1),)
    if cut == "gated":
        halves = [shard.chunk(2, dim=0) for shard in shards]
        return tuple(torch.cat([half[i] for half in halves]) for i in range(2))
    queries = architecture.heads // architecture.kv_groups
    rest = shards[0].shape[1:]
    merged = torch.cat(list(shards)).reshape(architecture.kv_groups, queries + 2, architecture.head_dim, *rest)
    parts = merged.tensor_split((queries, queries + 1), dim=1)
    return tuple(part.reshape(-1, *rest) for part in parts)


def _by_group(tensor: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """View a q, k or v projection [heads * head_dim, ...] as [kv_groups, heads of the group, head_dim, ...]."""
    return tensor.reshape(architecture.kv_groups, -1, architecture.head_dim, *tensor.shape[1:])
