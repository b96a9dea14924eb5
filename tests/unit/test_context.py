"""Cutting microbatches over context ranks: the parts complete each other, and every row keeps its label."""

from __future__ import annotations

import pytest
import torch
from samples import SAMPLES, TOTAL

from megatron_copsd.data.batches.batching import microbatch
from megatron_copsd.data.batches.context import cut_for_context, sequence_multiple
from megatron_copsd.types import Microbatch

WEIGHTS = tuple(0.5 + s.index for s in SAMPLES)


def whole(view: str, size: int, packed: bool) -> Microbatch:
    multiple = sequence_multiple(size)
    return microbatch(SAMPLES, view, 0, WEIGHTS, multiple, packed, multiple)


@pytest.mark.parametrize("view", ["student", "teacher"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_parts_complete_each_other(view: str, size: int, packed: bool) -> None:
    batch = whole(view, size, packed)
    parts = [cut_for_context(batch, rank, size) for rank in range(size)]
    assert len({part.tokens.shape for part in parts}) == 1
    assert sum(part.tokens.numel() for part in parts) == batch.tokens.numel()
    numbers = torch.cat([part.row_numbers for part in parts])
    assert numbers.sort().values.tolist() == list(range(TOTAL))
    for name in ("labels", "row_weights"):
        together = torch.cat([getattr(part, name) for part in parts])[numbers.argsort()]
        assert torch.equal(together, getattr(batch, name))
    for part in parts:
        assert int(part.loss_mask.sum()) == len(part.row_numbers)
        assert part.row_numbers.tolist() == sorted(part.row_numbers.tolist())
        assert part.response_lengths == batch.response_lengths
        # What lies at a row's position is the token before its label.
        before = batch.tokens[batch.loss_mask][part.row_numbers]
        assert torch.equal(part.tokens[part.loss_mask], before)


def test_chunks_come_from_both_ends() -> None:
    batch = whole("student", 2, packed=False)
    width = batch.tokens.shape[1] // 4
    positions = batch.position_ids.view(len(SAMPLES), 4, width)
    for rank, chunks in ((0, (0, 3)), (1, (1, 2))):
        part = cut_for_context(batch, rank, 2)
        assert torch.equal(part.position_ids, positions[:, chunks].flatten(1))


def test_packed_sequences_are_cut_one_by_one() -> None:
    batch = whole("teacher", 2, packed=True)
    assert batch.packed_lengths is not None
    part = cut_for_context(batch, 1, 2)
    positions = part.position_ids[0].split([length // 2 for length in batch.packed_lengths])
    for own, length in zip(positions, batch.packed_lengths, strict=True):
        assert own.tolist() == list(range(length // 4, 3 * length // 4))


def test_one_rank_has_it_all_and_nothing_is_padded_for_it() -> None:
    batch = whole("student", 1, packed=True)
    assert cut_for_context(batch, 0, 1) is batch
    assert batch.tokens.numel() == sum(len(s.pair.student_prompt) + len(s.rollout.response) for s in SAMPLES)


def test_an_empty_microbatch_can_be_cut() -> None:
    for packed in (False, True):
        part = cut_for_context(microbatch((), "student", 0, (), 4, packed, 4), 1, 2)
        assert part.tokens.shape == (1, 2)
        assert len(part.row_numbers) == 0
