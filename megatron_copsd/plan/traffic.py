"""Bytes that one rank hands to each collective in a step.

Counted as the collectives' arguments are: a reduction counts the tensor that goes in, a gather the one that comes out,
a message what is sent. Tensor, pipeline and data parallelism of the torch implementation are checked byte for byte
against real runs; sequence, context and expert parallelism are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_copsd.architecture import Architecture, recomputed_layers, stage_layers
from megatron_copsd.plan.activations import layer_tokens
from megatron_copsd.plan.memory import static_bytes
from megatron_copsd.plan.workload import MicrobatchShape, PlanLayout, Workload

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "send", "all_to_all"]
Axis = Literal["tensor", "pipeline", "context", "expert", "data", "embedding", "world"]

_FLOAT, _DOUBLE = 4, 8
_SHAPE_MESSAGE = 3 * 8  # stages announce each tensor's three sizes
_STATISTICS, _SUMS = 3, 5  # numbers a row that the loss gathers for each view, and that it adds up


@dataclass(frozen=True)
class Transfer:
    """What one rank hands to one kind of collective over one axis in one phase.

    Attributes:
        phase: ``teacher``, ``student`` or ``update``.
        kind, axis: of the collective.
        bytes: over all its calls.
        calls: how many.
    """

    phase: str
    kind: Kind
    axis: Axis
    bytes: int
    calls: int = 1


def step_traffic(
    model: Architecture,
    layout: PlanLayout,
    work: Workload,
    student: Sequence[MicrobatchShape],
    teacher: Sequence[MicrobatchShape],
    stage: int,
) -> list[Transfer]:
    """Return the collectives of both passes, the gradient reduction and the update, of a rank of one stage.

    Args:
        model, layout, work: what is trained and how.
        student, teacher: the replica's microbatches; no teacher where there is none.
        stage: pipeline stage of the rank.
    """
    found = []
    for phase, shapes in (("teacher", teacher), ("student", student)):
        found += _layer_transfers(model, layout, work, shapes, stage, phase)
        found += _stage_transfers(model, layout, work, shapes, stage, phase)
    if stage == layout.pipeline - 1:
        found += _loss_transfers(model, layout, work, student)
    found += _update_transfers(model, layout, work, stage)
    return [transfer for transfer in found if transfer.bytes]


def total_by_kind(transfers: Iterable[Transfer]) -> dict[str, int]:
    """Bytes of each kind of collective."""
    totals: dict[str, int] = {}
    for transfer in transfers:
        totals[transfer.kind] = totals.get(transfer.kind, 0) + transfer.bytes
    return totals


def _layer_transfers(
    model: Architecture, layout: PlanLayout, work: Workload, shapes: Sequence[MicrobatchShape], stage: int, phase: str
) -> list[Transfer]:
    """Collectives inside the layers: hidden states over tensor ranks, keys and values over context ranks, experts."""
    layers = stage_layers(model.layers, layout.settings)[stage]
    tokens = sum(layer_tokens(layout, shape).inside for shape in shapes)
    state = tokens * model.hidden * work.item
    backward = phase == "student"
    forwards = layers + (recomputed_layers(model.layers, layout.settings)[stage] if backward else 0)
    found = []
    if layout.tensor > 1:
        passes = 2 * (forwards + layers * backward) + (stage == 0)
        calls = passes * len(shapes)
        if not layout.sequence:
            found.append(Transfer(phase, "all_reduce", "tensor", passes * state, calls))
        else:
            # Each reduction is a scatter and a gather; the backward pass gathers the linear layers' inputs once more.
            gathers = passes + 2 * layers * backward
            found.append(Transfer(phase, "reduce_scatter", "tensor", passes * state, calls))
            found.append(Transfer(phase, "all_gather", "tensor", gathers * state, gathers * len(shapes)))
    if layout.context > 1:
        whole = tokens * layout.context * 2 * model.kv_width // layout.tensor * work.item
        found.append(Transfer(phase, "all_gather", "context", forwards * whole, forwards * len(shapes)))
        calls = layers * backward
        found.append(Transfer(phase, "reduce_scatter", "context", calls * whole, calls * len(shapes)))
    if layout.expert > 1:
        sent = tokens // layout.norm_shards * model.experts_per_token * model.hidden * work.item
        calls = 2 * (forwards + layers * backward)
        found.append(Transfer(phase, "all_to_all", "expert", calls * sent, calls * len(shapes)))
    return found


def _stage_transfers(
    model: Architecture, layout: PlanLayout, work: Workload, shapes: Sequence[MicrobatchShape], stage: int, phase: str
) -> list[Transfer]:
    """Messages between stages: hidden states forward, their gradients back, and the shapes of both."""
    hops = layout.virtual * (stage < layout.pipeline - 1) + (layout.virtual - 1) * (stage == layout.pipeline - 1)
    if phase == "student":
        hops += layout.virtual * (stage > 0) + (layout.virtual - 1) * (stage == 0 and layout.pipeline > 1)
    each = [layer_tokens(layout, shape).between * model.hidden * work.item + _SHAPE_MESSAGE for shape in shapes]
    return [Transfer(phase, "send", "pipeline", hops * sum(each), hops * len(each))]


def _loss_transfers(
    model: Architecture, layout: PlanLayout, work: Workload, student: Sequence[MicrobatchShape]
) -> list[Transfer]:
    """Softmax statistics and sums of the vocabulary's shards, and the hidden states' gradient."""
    if layout.tensor == 1:
        return []
    rows = sum(-(-shape.rows // layout.context) for shape in student)
    views = 2 if work.teacher else 1
    walks = 2 if work.loss_recompute else 1
    gathered = layout.tensor * (views * _STATISTICS + (not work.teacher)) * _DOUBLE
    reduced = model.hidden * _FLOAT + (walks * _SUMS * _DOUBLE if work.teacher else 0)
    calls = len(student)
    return [
        Transfer("student", "all_gather", "tensor", walks * rows * gathered, walks * calls),
        Transfer("student", "all_reduce", "tensor", rows * reduced, 2 * calls),
    ]


def _update_transfers(model: Architecture, layout: PlanLayout, work: Workload, stage: int) -> list[Transfer]:
    held = static_bytes(model, layout, work, stage)
    edge = stage in (0, layout.pipeline - 1)
    found = []
    if layout.shards > 1 and layout.distributed_optimizer:
        found.append(Transfer("update", "reduce_scatter", "data", held.gradients))
        found.append(Transfer("update", "all_gather", "data", held.buffer))
    elif layout.shards > 1:
        found.append(Transfer("update", "all_reduce", "data", held.gradients))
    if layout.tensor > 1:
        layers = stage_layers(model.layers, layout.settings)[stage]
        norms = layers * 2 * model.head_dim if model.qk_norm else 0
        if layout.sequence:
            norms += layers * 2 * model.hidden + (stage == layout.pipeline - 1) * model.hidden
        found.append(Transfer("update", "all_reduce", "tensor", norms * _FLOAT))
    if model.tied and layout.pipeline > 1 and edge and work.adapters is None:
        rows = model.padded_vocab(layout.tensor) // layout.tensor
        found.append(Transfer("update", "all_reduce", "embedding", rows * model.hidden * _FLOAT))
    if (layout.gpus if layout.distributed_optimizer else layout.tensor * layout.pipeline) > 1:
        # The gradient norm: looked at before anything is applied, and taken again by Megatron's step.
        found.append(Transfer("update", "all_reduce", "world", 2 * _FLOAT))
    return found
