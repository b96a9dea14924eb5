"""From samples to microbatches: the one place that says which logits predict which response token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_copsd.config.sections.objective import Reduction
from megatron_copsd.types import Microbatch, Sample, View

NO_SAMPLE = -1
"""Sample index of the dummy sequence of an empty microbatch."""


def row_weights(
    samples: Sequence[Sample],
    reduction: Reduction,
    num_loss_tokens: int,
    num_sequences: int,
) -> tuple[float, ...]:
    """Return the weight that every response row of each sample has in the loss.

    token_mean: advantage / num_loss_tokens; sequence_mean: advantage / (num_sequences * length of the response);
    subset_mean: subset_weight / length of the response. The loss of the global batch is then the plain sum of weight
    times token loss, however it is cut into microbatches.

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
    if reduction == "sequence_mean":
        return tuple(sample.advantage / (num_sequences * len(sample.rollout.response)) for sample in samples)
    return tuple(sample.pair.subset_weight / len(sample.rollout.response) for sample in samples)


def microbatch(
    samples: Sequence[Sample],
    view: View,
    pad_id: int,
    weights: Sequence[float],
    length_multiple: int = 1,
    packed: bool = False,
    sequence_multiple: int = 1,
) -> Microbatch:
    """Lay samples out as right-padded sequences of one view, or behind each other in one row.

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
        packed: one row for all sequences; padding, if any, counts as part of the sequence that it follows.
        sequence_multiple: every sequence's own length is rounded up to a multiple of it (context parallelism needs one
            of 2 CP); it divides ``length_multiple``, or the other way round.

    Returns:
        CPU tensors: int64 [B, T] tokens and position_ids, bool [B, T] loss_mask and padding, int64 [R] labels, float32
        [R] row_weights and sampled_log_probs; B is 1 where packed.
    """
    prompts = [s.pair.student_prompt if view == "student" else s.pair.teacher_prompt for s in samples]
    responses = [s.rollout.response for s in samples]
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)] or [1]
    lengths = [-(-length // sequence_multiple) * sequence_multiple for length in lengths]
    needed = sum(lengths) if packed else max(lengths)
    width = -(-needed // length_multiple) * length_multiple
    tokens = torch.full((1 if packed else len(lengths), width), pad_id, dtype=torch.int64)
    loss_mask = torch.zeros(tokens.shape, dtype=torch.bool)
    padding = torch.ones(tokens.shape, dtype=torch.bool)
    if packed:
        lengths[-1] += width - needed
    sequences = _sequences(tokens, lengths if packed else None)
    masks, paddings = (_sequences(mask, lengths if packed else None) for mask in (loss_mask, padding))
    # An empty microbatch has a sequence, the dummy one, and no sample.
    for row, mask, behind, prompt, response in zip(sequences, masks, paddings, prompts, responses, strict=False):
        assert prompt, "the first response token needs a position that predicts it"
        assert response, "a sample without response tokens has nothing to train on"
        length = len(prompt) + len(response)
        row[:length] = torch.tensor(prompt + response)
        mask[len(prompt) - 1 : length - 1] = True
        behind[:length] = False
    counts = torch.tensor([len(response) for response in responses], dtype=torch.int64)
    return Microbatch(
        tokens=tokens,
        position_ids=torch.cat([torch.arange(len(row)) for row in sequences]).view_as(tokens),
        loss_mask=loss_mask,
        padding=padding,
        labels=torch.tensor([token for response in responses for token in response], dtype=torch.int64),
        row_weights=torch.tensor(weights, dtype=torch.float32).repeat_interleave(counts),
        sampled_log_probs=torch.tensor([p for s in samples for p in s.rollout.token_log_probs], dtype=torch.float32),
        sample_indices=tuple(s.index for s in samples) or (NO_SAMPLE,),
        response_lengths=tuple(len(response) for response in responses) or (0,),
        row_numbers=torch.arange(sum(len(response) for response in responses)),
        packed_lengths=tuple(lengths) if packed else None,
    )


def _sequences(values: torch.Tensor, packed_lengths: Sequence[int] | None) -> tuple[torch.Tensor, ...]:
    """Return views of each sequence of [B, T], padding included."""
    return values.unbind() if packed_lengths is None else values[0].split(list(packed_lengths))
