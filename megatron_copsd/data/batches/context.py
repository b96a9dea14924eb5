"""Sequences cut over context-parallel ranks.

Each sequence is cut into 2 CP chunks; rank r has chunk r and, counted from the other end, chunk 2 CP - 1 - r. Under a
causal mask every rank then attends to equally many positions. Megatron cuts rotary positions in the same way.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_copsd.types import Microbatch


def sequence_multiple(size: int) -> int:
    """Return what the length of every sequence must be a multiple of."""
    return 2 * size if size > 1 else 1


def cut_for_context(batch: Microbatch, rank: int, size: int) -> Microbatch:
    """Return a context-parallel rank's part of a whole microbatch; the ranks' response rows complete each other.

    Args:
        batch: the microbatch, its sequences as long as ``sequence_multiple`` demands.
        rank, size: in the context-parallel group.
    """
    if size == 1:
        return batch
    columns = _columns(batch.packed_lengths or (batch.tokens.shape[1],), rank, size)
    # Rows are numbered in (sequence, position) order, which the cut keeps.
    numbers = torch.full(batch.loss_mask.shape, -1)
    numbers[batch.loss_mask] = batch.row_numbers
    own = numbers[:, columns]
    loss_mask = own >= 0
    rows = own[loss_mask]
    return replace(
        batch,
        tokens=batch.tokens[:, columns],
        position_ids=batch.position_ids[:, columns],
        loss_mask=loss_mask,
        padding=batch.padding[:, columns],
        labels=batch.labels[rows],
        row_weights=batch.row_weights[rows],
        sampled_log_probs=batch.sampled_log_probs[rows],
        row_numbers=rows,
    )


def _columns(lengths: tuple[int, ...], rank: int, size: int) -> torch.Tensor:
    """Positions of a rank in a row of sequences of these lengths."""
    columns, start = [], 0
    for length in lengths:
        assert length % (2 * size) == 0, f"a sequence of {length} tokens can't be cut over {size} context ranks"
        chunks = torch.arange(start, start + length).view(2 * size, -1)
        columns += [chunks[rank], chunks[2 * size - 1 - rank]]
        start += length
    return torch.cat(columns)
