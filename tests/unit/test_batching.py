"""Alignment: which logits predict which response token, and weights that no cut of the batch changes."""

import math

import pytest
import torch
from samples import SAMPLES, TOTAL, VOCAB

from megatron_copsd.data.batches.batching import NO_SAMPLE, microbatch, row_weights
from megatron_copsd.data.batches.partition import Grouping, group_samples, share_samples
from megatron_copsd.types import Problem, PromptPair, Rollout, Sample


def hidden(tokens: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """A causal stand-in for a model: every position depends on all tokens up to it and on their positions."""
    embedding = torch.randn(VOCAB, 4, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return (embedding[tokens] * (1 + position_ids[..., None])).cumsum(dim=1)


@pytest.mark.parametrize("view", ["student", "teacher"])
def test_layout_of_a_small_batch_written_out(view: str) -> None:
    pair = PromptPair(Problem("x:1", "SWA", "?"), (11, 12), (21, 22, 23))
    long = Sample(pair, Rollout((1, 2, 3), (0.0,) * 3, "stop", 0, ""), 4)
    short = Sample(PromptPair(pair.problem, (13,), (24,)), Rollout((0,), (0.0,), "length", 0, ""), 9)
    batch = microbatch([long, short], view, pad_id=0, weights=(0.5, 0.25))
    if view == "student":
        assert batch.tokens.tolist() == [[11, 12, 1, 2, 3], [13, 0, 0, 0, 0]]
        assert batch.loss_mask.int().tolist() == [[0, 1, 1, 1, 0], [1, 0, 0, 0, 0]]
    else:
        assert batch.tokens.tolist() == [[21, 22, 23, 1, 2, 3], [24, 0, 0, 0, 0, 0]]
        assert batch.loss_mask.int().tolist() == [[0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [list(range(batch.tokens.shape[1]))] * 2
    assert batch.labels.tolist() == [1, 2, 3, 0]
    assert batch.row_weights.tolist() == [0.5, 0.5, 0.5, 0.25]
    assert batch.sample_indices == (4, 9)
    assert batch.response_lengths == (3, 1)
    dtypes = (batch.tokens.dtype, batch.position_ids.dtype, batch.labels.dtype, batch.row_weights.dtype)
    assert dtypes == (torch.int64, torch.int64, torch.int64, torch.float32)


def test_a_packed_batch_written_out() -> None:
    problem = Problem("x:1", "SWA", "?")
    long = Sample(PromptPair(problem, (11, 12), (21,)), Rollout((1, 2, 3), (0.0,) * 3, "stop", 0, ""), 4)
    short = Sample(PromptPair(problem, (13,), (24,)), Rollout((4,), (0.0,), "length", 0, ""), 9)
    batch = microbatch([long, short], "student", 0, (0.5, 0.25), length_multiple=4, packed=True)
    assert batch.tokens.tolist() == [[11, 12, 1, 2, 3, 13, 4, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch.loss_mask.int().tolist() == [[0, 1, 1, 1, 0, 1, 0, 0]]
    assert batch.packed_lengths == (5, 3)
    assert batch.labels.tolist() == [1, 2, 3, 4]
    assert batch.row_weights.tolist() == [0.5, 0.5, 0.5, 0.25]
    assert batch.response_lengths == (3, 1)


@pytest.mark.parametrize("view", ["student", "teacher"])
@pytest.mark.parametrize("pad_id", [0, VOCAB - 1])
@pytest.mark.parametrize("length_multiple", [1, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_those_of_each_sequence_by_itself(view: str, pad_id: int, length_multiple: int, packed: bool) -> None:
    batch = microbatch(SAMPLES, view, pad_id, (1.0,) * len(SAMPLES), length_multiple, packed)
    assert batch.tokens.shape[1] % length_multiple == 0
    lengths = batch.packed_lengths or batch.tokens.shape[1:]
    cut = [part.split(lengths, dim=1) for part in (batch.tokens, batch.position_ids, batch.loss_mask)]
    rows = torch.cat([hidden(tokens, positions)[mask] for tokens, positions, mask in zip(*cut, strict=True)])
    expected, labels = [], []
    for s in SAMPLES:
        prompt = s.pair.student_prompt if view == "student" else s.pair.teacher_prompt
        for n, token in enumerate(s.rollout.response):
            seen = torch.tensor([prompt + s.rollout.response[:n]])
            expected.append(hidden(seen, torch.arange(seen.shape[1])[None])[0, -1])
            labels.append(token)
    torch.testing.assert_close(rows, torch.stack(expected), rtol=0, atol=1e-12)
    assert batch.labels.tolist() == labels


def test_both_views_have_the_same_rows() -> None:
    student, teacher = (microbatch(SAMPLES, view, 0, (1.0,) * len(SAMPLES)) for view in ("student", "teacher"))
    assert torch.equal(student.labels, teacher.labels)
    assert student.response_lengths == teacher.response_lengths
    assert student.loss_mask.sum(dim=1).tolist() == teacher.loss_mask.sum(dim=1).tolist()
    assert sum(student.response_lengths) == len(student.labels) == TOTAL


def test_weights_follow_their_equations() -> None:
    token_mean = row_weights(SAMPLES, "token_mean", TOTAL, len(SAMPLES))
    assert token_mean == tuple(s.advantage / TOTAL for s in SAMPLES)
    plain = [Sample(s.pair, s.rollout, s.index) for s in SAMPLES]
    for reduction in ("token_mean", "sequence_mean"):
        weights = row_weights(plain, reduction, TOTAL, len(plain))
        assert math.isclose(sum(w * len(s.rollout.response) for w, s in zip(weights, plain, strict=True)), 1)
    sequence_mean = row_weights(SAMPLES, "sequence_mean", TOTAL, len(SAMPLES))
    assert sequence_mean[2] == -0.5 / (len(SAMPLES) * 2)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 5, 16])
def test_no_cut_of_the_batch_changes_the_loss(reduction: str, dp_size: int, micro_batch_size: int) -> None:
    def total(parts: list[tuple[Sample, ...]]) -> torch.Tensor:
        value = torch.zeros((), dtype=torch.float64)
        for part in parts:
            weights = row_weights(part, reduction, TOTAL, len(SAMPLES))
            batch = microbatch(part, "student", 0, weights)
            token_loss = hidden(batch.tokens, batch.position_ids)[batch.loss_mask].sum(dim=1).cos()
            value += (batch.row_weights.double() * token_loss).sum()
        return value

    shares = share_samples(SAMPLES, dp_size, by_tokens=False, with_teacher=True)
    ranks = group_samples(shares, "student", Grouping(micro_batch_size, None, False))
    assert len({len(parts) for parts in ranks}) == 1
    assert len(ranks[0]) == math.ceil(math.ceil(len(SAMPLES) / dp_size) / micro_batch_size)
    assert all(len(part) <= micro_batch_size for parts in ranks for part in parts)
    indices = [s.index for parts in ranks for part in parts for s in part]
    assert sorted(indices) == [s.index for s in SAMPLES]
    whole = total([tuple(SAMPLES)])
    torch.testing.assert_close(total([part for parts in ranks for part in parts]), whole, rtol=0, atol=1e-12)


def test_an_empty_microbatch_is_one_sequence_without_rows() -> None:
    batch = microbatch((), "teacher", 5, row_weights((), "sequence_mean", TOTAL, 7), length_multiple=4)
    assert batch.tokens.tolist() == [[5, 5, 5, 5]]
    assert not batch.loss_mask.any()
    assert batch.labels.shape == batch.row_weights.shape == (0,)
    assert (batch.labels.dtype, batch.row_weights.dtype) == (torch.int64, torch.float32)
    assert batch.sample_indices == (NO_SAMPLE,)
    assert batch.response_lengths == (0,)
    assert microbatch((), "teacher", 5, (), length_multiple=4, packed=True).packed_lengths == (4,)


def test_padding_is_what_follows_the_last_token() -> None:
    batch = microbatch(SAMPLES[:4], "student", 0, (1.0,) * 4, length_multiple=4)
    lengths = [len(s.pair.student_prompt) + len(s.rollout.response) for s in SAMPLES[:4]]
    assert batch.tokens.shape[1] % 4 == 0
    expected = torch.arange(batch.tokens.shape[1]) >= torch.tensor(lengths).unsqueeze(1)
    assert torch.equal(batch.padding, expected)
    packed = microbatch(SAMPLES[:4], "student", 0, (1.0,) * 4, 4, packed=True, sequence_multiple=4)
    assert [row.sum() for row in packed.padding[0].split(packed.packed_lengths)] == [-length % 4 for length in lengths]
    assert microbatch((), "student", 0, ()).padding.all()
