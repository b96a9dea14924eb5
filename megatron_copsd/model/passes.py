"""Microbatches of a step, and the two passes over them through Megatron's pipeline schedules.

The teacher's is forward only, the student's forward and backward. On the last stage both reduce hidden states [T, B, H]
to the compact response rows [R, H] at once: prompt positions and padding never reach the loss or the teacher's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_copsd.config.schema import Config
from megatron_copsd.data.batches.batching import microbatch, row_weights
from megatron_copsd.data.batches.context import cut_for_context, sequence_multiple
from megatron_copsd.data.batches.partition import group_samples, grouping, share_samples
from megatron_copsd.model.experts import announce_positions
from megatron_copsd.model.packing import packed_sequences
from megatron_copsd.model.parallel import Layout
from megatron_copsd.types import Microbatch, Sample, View

Payload = TypeVar("Payload")


def make_microbatches(
    samples: Sequence[Sample], view: View, config: Config, layout: Layout, pad_id: int
) -> list[Microbatch]:
    """Cut the global batch into this process's microbatches of one view; both views have the same samples.

    Args:
        samples: the global batch.
        view: whose sequences.
        config: how large microbatches are, how rows are weighted, and whether a teacher's pass counts as work.
        layout: this process's place.
        pad_id: any valid token id: masks come from lengths, never from ids.
    """
    optimizer = config.optimizer
    num_tokens = sum(len(sample.rollout.response) for sample in samples)
    by_tokens = optimizer.micro_batch_tokens is not None
    shares = share_samples(samples, layout.data_size, by_tokens=by_tokens, with_teacher=config.method.uses_teacher)
    groups = group_samples(shares, view, grouping(optimizer, view), layout.microbatch_multiple)[layout.data_rank]
    weights = [row_weights(part, config.loss.reduction, num_tokens, len(samples)) for part in groups]
    multiple = sequence_multiple(layout.context_size)
    whole = [
        microbatch(part, view, pad_id, w, layout.length_multiple * multiple, optimizer.packing, multiple)
        for part, w in zip(groups, weights, strict=True)
    ]
    return [cut_for_context(batch, layout.context_rank, layout.context_size) for batch in whole]


@dataclass(frozen=True)
class RowLoss(Generic[Payload]):
    """What the last stage makes of one student microbatch.

    Attributes:
        loss: scalar, already divided by the global count, with autograd.
        payload: whatever the objective reports of the microbatch.
    """

    loss: torch.Tensor
    payload: Payload


def forward_pass(
    chunks: Sequence[DistributedDataParallel],
    microbatches: Sequence[Microbatch],
    use: Callable[[int, torch.Tensor], Payload],
) -> list[Payload]:
    """Run forward over all microbatches and keep nothing for a backward pass.

    Args:
        chunks: Megatron DDP around each chunk of this process's stage.
        microbatches: this replica's, the same number on every replica.
        use: what becomes of the final hidden states at the response rows of microbatch ``i``, [R, H]; called on the
            last stage only, as soon as they are there.

    Returns:
        What ``use`` returned, one a microbatch, on the last stage; [] elsewhere.

    Collectives: the forward-only pipeline schedule.
    """

    def last_stage(index: int, rows: torch.Tensor) -> RowLoss[Payload]:
        return RowLoss(rows.new_zeros(()), use(index, rows))

    with torch.no_grad():
        return _run_schedule(chunks, microbatches, last_stage, forward_only=True)


def student_pass(
    chunks: Sequence[DistributedDataParallel],
    microbatches: Sequence[Microbatch],
    row_loss: Callable[[int, torch.Tensor], RowLoss[Payload]],
    positions: int,
) -> list[Payload]:
    """Run forward and backward over all microbatches, accumulate gradients, and reduce them over replicas.

    Args:
        chunks: Megatron DDP around each chunk of this process's stage.
        microbatches: this replica's, the same number on every replica.
        row_loss: makes the loss of microbatch ``i`` from its response rows [R, H]; called on the last stage only.
        positions: tokens of the step's sequences, over all microbatches and replicas.

    Returns:
        The payloads, one a microbatch, on the last stage; [] elsewhere.

    Collectives: the 1F1B pipeline schedule, then Megatron's gradient reductions.
    """
    announce_positions(chunks, positions)
    return _run_schedule(chunks, microbatches, row_loss, forward_only=False)


def _run_schedule(
    chunks: Sequence[DistributedDataParallel],
    microbatches: Sequence[Microbatch],
    last_stage: Callable[[int, torch.Tensor], RowLoss[Payload]],
    *,
    forward_only: bool,
) -> list[Payload]:
    device = next(chunks[0].parameters()).device

    def forward_step(
        batches: Iterator[tuple[int, Microbatch]], chunk: DistributedDataParallel
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, Payload]]]:
        index, batch = next(batches)
        padding = batch.padding.to(device) if chunks[0].config.moe_aux_loss_coeff else None
        hidden = chunk(
            batch.tokens.to(device),
            batch.position_ids.to(device),
            None,
            packed_seq_params=packed_sequences(batch, chunks[0].config, device),
            padding_mask=padding,
        )

        def loss_func(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Payload]:
            result = last_stage(index, response_rows(hidden, batch.loss_mask.to(device)))
            # The schedule counts tokens only to divide gradients by; they are divided already.
            return result.loss, torch.zeros((), dtype=torch.int, device=device), result.payload

        return hidden, loss_func

    chunks[0].config.finalize_model_grads_func = _reduce_gradients
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(enumerate(microbatches)) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(microbatches),
        seq_length=microbatches[0].tokens.shape[1],
        micro_batch_size=microbatches[0].tokens.shape[0],
        forward_only=forward_only,
    )


def response_rows(hidden: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """Pick the rows whose logits predict a response token.

    Args:
        hidden: [T, B, H], Megatron's sequence-first layout.
        loss_mask: bool [B, T].

    Returns:
        [R, H], sequence by sequence.
    """
    return hidden.transpose(0, 1)[loss_mask]


def _reduce_gradients(
    chunks: Sequence[DistributedDataParallel], num_tokens: torch.Tensor | None = None, **groups: Any
) -> None:
    # Without num_tokens Megatron sums over replicas and leaves the scale alone.
    finalize_model_grads(chunks, None, **groups)
