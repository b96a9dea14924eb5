"""Operations of a step, and how long it lasts, phase by phase; nothing overlaps that the trainer does not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_copsd.architecture import Architecture, recomputed_layers, stage_layers
from megatron_copsd.plan.hardware import GPUS_PER_NODE, Assumptions, Gpu
from megatron_copsd.plan.memory import cache_bytes_per_token, static_bytes
from megatron_copsd.plan.traffic import Transfer, step_traffic
from megatron_copsd.plan.workload import (
    MicrobatchShape,
    PlanLayout,
    Recompute,
    Workload,
    student_shapes,
    teacher_shapes,
)

# A backward pass multiplies twice for each product of the forward pass; fused attention also forms its scores again.
_BACKWARD = 2.0
_ATTENTION_BACKWARD = 2.5
_OPTIMIZER_BYTES = 34  # an element: gradient, master copy and moments read and written, parameter written


@dataclass(frozen=True)
class StepFlops:
    """Of one step over all GPUs.

    Attributes:
        model: what the mathematics needs: one teacher forward, the student's forward and backward, four products with
            the output weight. MFU counts these.
        hardware: the same and whatever is computed again. HFU counts these.
    """

    model: float
    hardware: float


def linear_flops_per_token(model: Architecture) -> float:
    """Forward operations of one layer's matrix products for one token."""
    projections = model.hidden * (2 * model.query_width + 2 * model.kv_width)
    return 2.0 * projections + feed_forward_flops_per_token(model)


def feed_forward_flops_per_token(model: Architecture) -> float:
    """Those of the feed-forward: gated, of one width or of the experts that a token goes to, and their router."""
    if not model.experts:
        return 2.0 * 3 * model.hidden * model.ffn
    return 2.0 * model.hidden * (model.experts_per_token * 3 * model.moe_ffn + model.experts)


def attention_flops(model: Architecture, length: int) -> float:
    """Forward operations of one layer's causal attention over one sequence: two products over half of length^2."""
    return 2.0 * model.query_width * length * length


def head_flops(model: Architecture, rows: int) -> float:
    """Operations of one product of so many rows with the output weight."""
    return 2.0 * rows * model.hidden * model.vocab_size


def step_flops(
    model: Architecture,
    student: Iterable[int],
    teacher: Iterable[int],
    rows: int,
    recompute: Recompute = "none",
    recomputed: int | None = None,
    loss_recompute: bool = False,
    adapters: bool = False,
) -> StepFlops:
    """Count one training step without its rollouts; padding counts as nothing.

    Args:
        model: whose step it is.
        student, teacher: tokens of every sequence of the step; no teacher where there is none.
        rows: response rows of the step.
        recompute: activations that the backward pass computes again.
        recomputed: under ``full``, how many of the model's layers; None: all.
        loss_recompute: whether the loss forms its logits again in the backward pass.
        adapters: whether the model's weights get no gradient; the adapters' own products count as nothing.
    """
    linear = linear_flops_per_token(model) * model.layers
    own, given = list(student), list(teacher)
    attention = model.layers * sum(attention_flops(model, length) for length in own)
    forward = linear * sum(own) + attention
    teacher_forward = linear * sum(given) + model.layers * sum(attention_flops(model, length) for length in given)
    views = 2 if given else 1
    products = views + (1 if adapters else 2)
    backward = _BACKWARD * forward - (linear * sum(own) if adapters else 0.0)
    needed = forward + backward + teacher_forward + products * head_flops(model, rows)
    fed = model.layers * sum(own) * feed_forward_flops_per_token(model)
    share = 1.0 if recomputed is None else recomputed / model.layers
    again = {"none": 0.0, "selective": fed, "full": forward * share}[recompute]
    again += (_ATTENTION_BACKWARD - _BACKWARD) * attention
    again += views * head_flops(model, rows) if loss_recompute else 0.0
    return StepFlops(needed, needed + again)


@dataclass(frozen=True)
class StepTime:
    """Prediction of one step.

    Attributes:
        seconds: by phase: rollout, sync, teacher, student, update.
        bubble: share of the student's phase in which a GPU waits for other stages.
        communication: share of the teacher's, student's and update phases spent in collectives.
        mfu: model operations over what the peak could do in the teacher's, student's and update phases.
        hfu: the same with what is computed again.
        tokens_per_second_per_gpu: response tokens of the step over its whole time and all GPUs, servers included.
        gpus: trainer's and servers'.
    """

    seconds: Mapping[str, float]
    bubble: float
    communication: float
    mfu: float
    hfu: float
    tokens_per_second_per_gpu: float
    gpus: int

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class _Pass:
    """Seconds of one pass over a replica's microbatches."""

    compute: float
    bubble: float
    communication: float

    @property
    def total(self) -> float:
        return self.compute + self.bubble + self.communication


def step_time(model: Architecture, layout: PlanLayout, work: Workload, gpu: Gpu, assumed: Assumptions) -> StepTime:
    """Predict a step of typical lengths."""
    lengths, count = work.typical, work.microbatches(layout.data, layout.micro_batch)
    batch = min(layout.micro_batch, -(-work.sequences // layout.data))
    student = student_shapes(lengths, count, batch)
    teacher = teacher_shapes(lengths, count, batch) if work.teacher else []
    # The last stage has the loss; the others are alike.
    traffic = step_traffic(model, layout, work, student, teacher, layout.pipeline - 1)
    own = _run(model, layout, work, gpu, assumed, student, traffic, "student")
    given = _run(model, layout, work, gpu, assumed, teacher, traffic, "teacher") if teacher else _Pass(0, 0, 0)
    swap = static_bytes(model, layout, work, 0).local / (gpu.host * assumed.host) if work.swaps_weights else 0
    update_traffic = _seconds(layout, gpu, assumed, (t for t in traffic if t.phase == "update"))
    seconds = {
        **_rollout(model, layout, work, gpu, assumed),
        "teacher": given.total + swap,
        "student": own.total,
        "update": update_traffic + _optimizer(model, layout, work, gpu, assumed),
    }
    trained = seconds["teacher"] + seconds["student"] + seconds["update"]
    flops = step_flops(
        model,
        [lengths.student] * work.sequences,
        [lengths.teacher] * work.sequences if teacher else [],
        work.sequences * lengths.response,
        recompute=layout.recompute,
        recomputed=sum(recomputed_layers(model.layers, layout.settings)),
        loss_recompute=work.loss_recompute,
        adapters=work.adapters is not None,
    )
    gpus = layout.gpus + (0 if work.shares_gpus else work.engines * work.engine_tensor)
    peak = layout.gpus * gpu.flops * trained
    return StepTime(
        seconds=seconds,
        bubble=own.bubble / own.total,
        communication=(own.communication + given.communication + update_traffic) / trained,
        mfu=flops.model / peak,
        hfu=flops.hardware / peak,
        tokens_per_second_per_gpu=work.sequences * lengths.response / sum(seconds.values()) / gpus,
        gpus=gpus,
    )


def _run(
    model: Architecture,
    layout: PlanLayout,
    work: Workload,
    gpu: Gpu,
    assumed: Assumptions,
    shapes: Iterable[MicrobatchShape],
    traffic: Iterable[Transfer],
    phase: str,
) -> _Pass:
    """One pass: compute of the slowest stage over all microbatches, what the pipeline waits, and its collectives."""
    shapes = list(shapes)
    ways = layout.tensor * layout.context
    once, twice = (_layer_seconds(model, layout, work, gpu, assumed, shapes, phase, again) for again in (False, True))
    products = 0
    if phase == "student":
        products = (4 if work.teacher else 3) + (2 if work.loss_recompute else 0) - (work.adapters is not None)
    head = products * head_flops(model, shapes[0].rows) / (ways * assumed.gemm * gpu.flops)
    layers, again = stage_layers(model.layers, layout.settings), recomputed_layers(model.layers, layout.settings)
    stages = [(count - run_again) * once + run_again * twice for count, run_again in zip(layers, again, strict=True)]
    stages[-1] += head
    slowest = max(stages)
    compute = len(shapes) * stages[0] if layout.pipeline == 1 else len(shapes) * sum(stages) / layout.pipeline
    waiting = len(shapes) * slowest - compute + (sum(stages) - slowest) / layout.virtual
    return _Pass(compute, waiting, _seconds(layout, gpu, assumed, (t for t in traffic if t.phase == phase)))


def _layer_seconds(
    model: Architecture,
    layout: PlanLayout,
    work: Workload,
    gpu: Gpu,
    assumed: Assumptions,
    shapes: Sequence[MicrobatchShape],
    phase: str,
    again: bool,
) -> float:
    """Mean over the microbatches of one layer's time in a pass; ``again``: the backward pass runs it once more."""
    ways = layout.tensor * layout.context
    linear, attention = _pass_factors(model, layout, work, phase, again)
    gemm = gpu.flops * (assumed.expert_gemm if model.experts else assumed.gemm)
    floor = linear * assumed.layer * (3 if model.experts else 1)
    each = (
        linear * linear_flops_per_token(model) * shape.tokens / (ways * gemm)
        + attention * attention_flops(model, shape.length) * shape.sequences / (ways * gpu.flops * assumed.attention)
        for shape in shapes
    )
    return sum(max(seconds, floor) for seconds in each) / len(shapes)


def _pass_factors(
    model: Architecture, layout: PlanLayout, work: Workload, phase: str, again: bool
) -> tuple[float, float]:
    """How many forward passes' worth of matrix products and of attention a layer does."""
    if phase == "teacher":
        return 1.0, 1.0
    backward = 2.0 if work.adapters is None else 1.0  # frozen weights get no gradient
    linear, attention = (1.0, 1.0) if again else (0.0, 0.0)
    if layout.recompute == "selective":
        linear = feed_forward_flops_per_token(model) / linear_flops_per_token(model)
    return 1.0 + backward + linear, 1.0 + _ATTENTION_BACKWARD + attention


def _seconds(layout: PlanLayout, gpu: Gpu, assumed: Assumptions, transfers: Iterable[Transfer]) -> float:
    """Time of collectives one after the other, by ring algorithms over the slowest link that the group spans."""
    ranks = {
        "tensor": (layout.tensor, layout.tensor),
        "context": (layout.context, layout.tensor * layout.context),
        "expert": (layout.expert, layout.expert),
        "data": (layout.shards, layout.tensor * layout.shards),
        "pipeline": (2, layout.gpus),
        "embedding": (2, layout.gpus),
        "world": (layout.gpus, layout.gpus),
    }
    total = 0.0
    for transfer in transfers:
        size, span = ranks[transfer.axis]
        bandwidth = gpu.link * assumed.link if span <= GPUS_PER_NODE else gpu.network * assumed.network
        share = (size - 1) / size
        passes = {"all_reduce": 2 * share, "send": 1.0}.get(transfer.kind, share)
        total += passes * transfer.bytes / bandwidth + transfer.calls * assumed.latency
    return total


def _optimizer(model: Architecture, layout: PlanLayout, work: Workload, gpu: Gpu, assumed: Assumptions) -> float:
    owned = max(static_bytes(model, layout, work, stage).owned[0] for stage in (0, layout.pipeline - 1))
    return owned * _OPTIMIZER_BYTES / (gpu.memory_bandwidth * assumed.memory_bandwidth)


def _rollout(
    model: Architecture, layout: PlanLayout, work: Workload, gpu: Gpu, assumed: Assumptions
) -> dict[str, float]:
    """Sampling: each decoding step reads the weights and the cache once; and the weights' way to the engines."""
    engines = work.engines or layout.gpus // work.engine_tensor
    here = -(-work.sequences // engines)
    batch = min(here, work.concurrency)
    waves = math.ceil(here / batch)
    lengths, ways = work.typical, work.engine_tensor
    active, total = model.active_parameters, model.parameters
    touched = min(total, batch * active) * work.item / ways  # few tokens do not reach all experts
    context = lengths.student_prompt + lengths.response / 2
    cache = batch * context * cache_bytes_per_token(model, work) / ways
    reading = (touched + cache) / (gpu.memory_bandwidth * assumed.memory_bandwidth)
    computing = 2 * active * batch / (ways * gpu.flops * assumed.gemm)
    overhead = model.layers * (assumed.eager_layer if work.engine == "embedded" else assumed.decode_layer)
    prefill = 2 * active * batch * lengths.student_prompt / (ways * gpu.flops * assumed.gemm)
    link = gpu.link * assumed.link if work.engine == "embedded" else gpu.network * assumed.network
    return {
        "sync": total * work.item / link,
        "rollout": waves * (prefill + lengths.response * (max(reading, computing) + overhead)),
    }
