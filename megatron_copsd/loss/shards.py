"""What is done over the shards of a vocabulary: the two collectives between kernels, and the cut of a teacher.

A process group holds the shards in vocabulary order; None stands for one rank that holds the whole vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# Logits of entries that are left out: finite, so that no difference is NaN, and their probability is exactly 0.
_LEFT_OUT = -1e30

# Elements that an operation may need besides the logits.
_BLOCK_ELEMENTS = 1 << 22


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


def keep_top_k_(logits: Tensor, k: int, temperature: float, group: dist.ProcessGroup | None) -> Tensor:
    """Leave out all but the k largest logits of each row over the whole vocabulary, in place; ties with the k-th stay.

    Args:
        logits: [C, V_local], not divided by the temperature.
        k: how many to keep.
        temperature: divides the logits in what is returned.
        group: ranks that hold the shards of the vocabulary.

    Returns:
        [C] float64, the log-normaliser of the untouched rows, log sum_v exp(logit_v / T).

    Collectives: one all_gather [C, k + 1] float64.
    """
    rows, columns = logits.shape
    local = torch.full((rows, k + 1), -torch.inf, dtype=torch.float64, device=logits.device)
    blocks = [slice(i, i + size) for size in [max(1, _BLOCK_ELEMENTS // max(1, columns))] for i in range(0, rows, size)]
    for block in blocks:
        if columns:
            local[block, : min(k, columns)] = logits[block].topk(min(k, columns), dim=1).values.double()
            local[block, k] = (logits[block] / temperature).logsumexp(dim=1).double()
    shards = gather_shards(local, group)
    largest = shards[:, :, :k].transpose(0, 1).reshape(rows, -1)
    threshold = largest.topk(k, dim=1).values[:, -1:].to(logits.dtype)
    for block in blocks:
        logits[block].masked_fill_(logits[block] < threshold[block], _LEFT_OUT)
    return shards[:, :, k].logsumexp(dim=0)
