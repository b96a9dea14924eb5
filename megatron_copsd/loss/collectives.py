"""Collectives over the shards of a vocabulary."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def gather_shards(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Parts of all shards, stacked in rank order: [...] -> [shards, ...]; one shard where ``group`` is None.

    Collectives: one all_gather over ``group``.
    """
    if group is None or dist.get_world_size(group) == 1:
        return part[None]
    parts = part.new_empty(dist.get_world_size(group), *part.shape)
    dist.all_gather(list(parts), part, group=group)
    return parts


def sum_over_shards_(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum of all shards' parts, in place and equal on all ranks; the part itself where ``group`` is None.

    Collectives: one all_reduce over ``group``; none for an empty part.
    """
    if group is not None and dist.get_world_size(group) > 1 and part.numel() > 0:
        dist.all_reduce(part, group=group)
    return part
