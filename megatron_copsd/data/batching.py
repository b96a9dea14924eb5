"""From samples to microbatches: the one place that says which logits predict which response token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from megatron_copsd.types import Microbatch, Sample, View

NO_SAMPLE = -1
"""Sample index of the dummy sequence of an empty microbatch."""


def row_weights(
    samples: Sequence[Sample],
    reduction: Literal["token_mean", "sequence_mean"],
    num_loss_tokens: int,
    num_sequences: int,
) -> tuple[float, ...]:
    """Return the weight that every response row of each sample has in the loss.

    token_mean: advantage / num_loss_tokens; sequence_mean: advantage / (num_sequences * length of the response). The
    loss of the global batch is then the plain sum of weight times token loss, however it is cut into microbatches.

    Args:
        samples: any part of the global batch.
        reduction: ``loss.reduction``.
        num_loss_tokens: response tokens of the whole global batch.
        num_sequences: samples of the whole global batch.

    Returns:
        One weight a sample, in the order of ``samples``.
    """
    if reduction == "token_mean":
        return tuple(sample.advantage / num_loss_tokens for sample in samples)
    return tuple(sample.advantage / (num_sequences * len(sample.rollout.response)) for sample in samples)


def partition(samples: Sequence[Sample], dp_size: int, dp_rank: int, micro_batch_size: int) -> list[tuple[Sample, ...]]:
    """Return the microbatches of one data-parallel rank.

    Rank r takes samples r, r + dp_size, r + 2 dp_size, ... Every rank gets the same number of microbatches, because
    pipeline schedules and collectives count on it; where samples run out, the last ones are short or empty.

    Args:
        samples: the whole global batch, the same on every rank.
        dp_size: data-parallel size.
        dp_rank: this rank.
        micro_batch_size: sequences of a full microbatch.

    Returns:
        The microbatches, at least one; an empty tuple is an empty microbatch.
    """
    assert 0 <= dp_rank < dp_size
    largest = -(-len(samples) // dp_size)
    own = samples[dp_rank::dp_size]
    starts = range(0, max(largest, 1), micro_batch_size)
    return [tuple(own[start : start + micro_batch_size]) for start in starts]


def microbatch(
    samples: Sequence[Sample],
    view: View,
    pad_id: int,
    weights: Sequence[float],
    length_multiple: int = 1,
) -> Microbatch:
    """Lay samples out as right-padded sequences of one view.

    The logits at position len(prompt) - 1 + n predict response token n, so ``loss_mask`` is true from the last prompt
    token to the last but one response token. Rows follow (sequence, position) order; the student's and the teacher's
    microbatch of the same samples have the same rows, whatever the lengths of their prompts. Which positions are
    padding is known from lengths alone: ``pad_id`` may be any valid id, also one that occurs in the text.

    Args:
        samples: sequences of the microbatch; none makes one dummy sequence that predicts nothing.
        view: whose prompt the response follows.
        pad_id: id to pad with.
        weights: weight of every row of each sample, see ``row_weights``.
        length_multiple: T is rounded up to a multiple of it (sequence parallelism needs one of TP).

    Returns:
        CPU tensors: int64 [B, T] tokens and position_ids, bool [B, T] loss_mask, int64 [R] labels, float32 [R]
        row_weights.
    """
    prompts = [s.pair.student_prompt if view == "student" else s.pair.teacher_prompt for s in samples]
    responses = [s.rollout.response for s in samples]
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    width = -(-max(lengths, default=1) // length_multiple) * length_multiple
    tokens = torch.full((max(len(samples), 1), width), pad_id, dtype=torch.int64)
    loss_mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (prompt, response, length) in enumerate(zip(prompts, responses, lengths, strict=True)):
        assert prompt, "the first response token needs a position that predicts it"
        assert response, "a sample without response tokens has nothing to train on"
        tokens[row, :length] = torch.tensor(prompt + response)
        loss_mask[row, len(prompt) - 1 : length - 1] = True
    counts = torch.tensor([len(response) for response in responses], dtype=torch.int64)
    return Microbatch(
        tokens=tokens,
        position_ids=torch.arange(width).repeat(len(tokens), 1),
        loss_mask=loss_mask,
        labels=torch.tensor([token for response in responses for token in response], dtype=torch.int64),
        row_weights=torch.tensor(weights, dtype=torch.float32).repeat_interleave(counts),
        sample_indices=tuple(s.index for s in samples) or (NO_SAMPLE,),
        response_lengths=tuple(len(response) for response in responses) or (0,),
    )


def padding_of(loss_mask: torch.Tensor) -> torch.Tensor:
    """Return which positions are padding: those after the token that the last response row of the sequence predicts.

    Args:
        loss_mask: bool [B, T] of a microbatch.

    Returns:
        bool [B, T]; all of a sequence that predicts nothing.
    """
    rows_to_come = loss_mask.flip(-1).cumsum(-1).flip(-1)
    padding = rows_to_come == 0
    padding[:, 1:] &= rows_to_come[:, :-1] == 0
    return padding
