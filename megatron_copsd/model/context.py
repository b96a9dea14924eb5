"""What context-parallel ranks exchange: keys and values in attention, response rows around the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch.nn.attention.bias import causal_lower_right

from megatron_copsd.model.parallel import Layout
from megatron_copsd.types import Microbatch


def whole_rows(batch: Microbatch, values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Bring the response rows of all context-parallel ranks together, in the order of the whole microbatch.

    Student and teacher prompts differ in length, so a token's row lies on one rank for the student and on another for
    the teacher.

    Args:
        batch: this rank's part of the microbatch.
        values: [R, ...] of its rows, without autograd.
        group: context-parallel ranks.

    Returns:
        [sum of ``batch.response_lengths``, ...].

    Collectives: one all-reduce of the result over ``group``. Each row comes from one rank, so the sum is exact.
    """
    if dist.get_world_size(group) == 1:
        return values
    whole = values.new_zeros(sum(batch.response_lengths), *values.shape[1:])
    whole[batch.row_numbers.to(values.device)] = values
    dist.all_reduce(whole, group=group)
    return whole


def by_sample(
    layout: Layout, batches: Sequence[Microbatch], token_values: Sequence[torch.Tensor]
) -> dict[int, list[float]]:
    """Return each sample's values of its response tokens by sample index, on every process.

    Args:
        layout: this process's place.
        batches: this replica's microbatches.
        token_values: [R] for each of them on the last stage; none elsewhere.

    Collectives: one all-reduce a microbatch over context ranks, one all-gather of Python objects over the world.
    """
    own: dict[int, list[float]] = {}
    for batch, values in zip(batches, token_values, strict=False):
        whole = whole_rows(batch, values.detach().float(), layout.context_group)
        parts = whole.cpu().split(batch.response_lengths)
        own |= {index: part.tolist() for index, part in zip(batch.sample_indices, parts, strict=True)}
    everywhere: list[dict[int, list[float]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, own if layout.reports else {})
    return {index: values for share in everywhere for index, values in share.items()}


def context_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    group: dist.ProcessGroup,
    scale: float | None,
) -> torch.Tensor:
    """Causal attention of this rank's two chunks of each sequence to all that precedes them, on whatever rank.

    Args:
        query: [T / CP, B, heads of this rank, head_dim], cut as in ``data.context``.
        key, value: the same with the key-value groups of this rank as heads.
        lengths: whole lengths of the sequences that lie behind each other; one, T, where they are padded.
        group: context-parallel ranks.
        scale: of the scores; None for 1 / sqrt(head_dim).

    Returns:
        [T / CP, B, heads of this rank, head_dim].

    Collectives: one all-gather of keys and values over ``group``; one reduce-scatter of their gradients.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    local = [length // size for length in lengths]
    gathered = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=group)
    by_rank = gathered.view(size, -1, *gathered.shape[1:]).split(local, dim=1)
    contexts = []
    for queries, parts in zip(query.split(local), by_rank, strict=True):
        keys, values = _in_order(parts).split([key.shape[-1], value.shape[-1]], dim=-1)
        for chunk, part in zip((rank, 2 * size - 1 - rank), queries.chunk(2), strict=True):
            before = (chunk + 1) * len(part)
            contexts.append(_attend(part, keys[:before], values[:before], scale))
    return torch.cat(contexts)


def _in_order(parts: torch.Tensor) -> torch.Tensor:
    """Return a sequence [T, ...] from the two chunks of each rank, [CP, T / CP, ...]."""
    early, late = parts.chunk(2, dim=1)
    return torch.cat([early, late.flip(0)]).flatten(0, 1)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Attention of a sequence's last positions, [t, B, heads, head_dim], to all of it, [T, B, groups, head_dim]."""
    repeats = query.shape[-2] // key.shape[-2]
    key, value = key.repeat_interleave(repeats, dim=-2), value.repeat_interleave(repeats, dim=-2)
    mask = causal_lower_right(len(query), len(key))
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).permute(2, 0, 1, 3)
