"""The two passes of a step through Megatron's pipeline schedules: teacher forward, student forward-backward.

On the last stage both reduce hidden states [T, B, H] to the compact response rows [R, H] at once: prompt positions and
padding never reach the loss or the teacher's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_copsd.data.batching import padding_of
from megatron_copsd.types import Microbatch

Payload = TypeVar("Payload")


@dataclass(frozen=True)
class RowLoss(Generic[Payload]):
    """What the last stage makes of one student microbatch.

    Attributes:
        loss: scalar, already divided by the global count, with autograd.
        payload: whatever the objective reports of the microbatch.
    """

    loss: torch.Tensor
    payload: Payload


def teacher_pass(model: torch.nn.Module, microbatches: Sequence[Microbatch]) -> list[torch.Tensor]:
    """Return the final hidden states at the response rows of each microbatch, [R, H], on the last stage; [] elsewhere.

    Collectives: the forward-only pipeline schedule.
    """

    def last_stage(_: int, rows: torch.Tensor) -> RowLoss[torch.Tensor]:
        return RowLoss(rows.new_zeros(()), rows)

    with torch.no_grad():
        return _run_schedule(model, microbatches, last_stage, forward_only=True)


def student_pass(
    model: torch.nn.Module,
    microbatches: Sequence[Microbatch],
    row_loss: Callable[[int, torch.Tensor], RowLoss[Payload]],
) -> list[Payload]:
    """Run forward and backward over all microbatches, accumulate gradients, and reduce them over replicas.

    Args:
        model: Megatron DDP around this process's stage.
        microbatches: this replica's, the same number on every replica.
        row_loss: makes the loss of microbatch ``i`` from its response rows [R, H]; called on the last stage only.

    Returns:
        The payloads, one a microbatch, on the last stage; [] elsewhere.

    Collectives: the 1F1B pipeline schedule, then Megatron's gradient reductions.
    """
    return _run_schedule(model, microbatches, row_loss, forward_only=False)


def _run_schedule(
    model: torch.nn.Module,
    microbatches: Sequence[Microbatch],
    last_stage: Callable[[int, torch.Tensor], RowLoss[Payload]],
    *,
    forward_only: bool,
) -> list[Payload]:
    device = next(model.parameters()).device

    def forward_step(batches, stage_model):
        index, batch = next(batches)
        padding = padding_of(batch.loss_mask).to(device) if model.config.moe_aux_loss_coeff else None
        hidden = stage_model(batch.tokens.to(device), batch.position_ids.to(device), None, padding_mask=padding)

        def loss_func(hidden: torch.Tensor):
            result = last_stage(index, response_rows(hidden, batch.loss_mask.to(device)))
            # The schedule counts tokens only to divide gradients by; they are divided already.
            return result.loss, torch.zeros((), dtype=torch.int, device=device), result.payload

        return hidden, loss_func

    model.config.finalize_model_grads_func = _reduce_gradients
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(enumerate(microbatches)),
        model=model,
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


def _reduce_gradients(models, num_tokens=None, **groups):
    # Without num_tokens Megatron sums over replicas and leaves the scale alone.
    finalize_model_grads(models, None, **groups)
