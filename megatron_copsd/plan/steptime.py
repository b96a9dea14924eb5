"""How long a step lasts, phase by phase, under the stated assumptions; nothing overlaps that the trainer does not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_copsd.plan.flops import (
    attention_flops,
    feed_forward_flops_per_token,
    head_flops,
    linear_flops_per_token,
    step_flops,
)
from megatron_copsd.plan.hardware import GPUS_PER_NODE, Assumptions, Gpu
from megatron_copsd.plan.layout import PlanLayout
from megatron_copsd.plan.memory import cache_bytes_per_token, static_bytes
from megatron_copsd.plan.sizes import ModelSizes
from megatron_copsd.plan.traffic import Transfer, step_traffic
from megatron_copsd.plan.workload import MicrobatchShape, Workload, student_shapes, teacher_shapes

_ATTENTION_BACKWARD = 2.5  # of the forward pass: fused attention forms its scores again
_OPTIMIZER_BYTES = 34  # an element: gradient, master copy and moments read and written, parameter written


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


def step_time(sizes: ModelSizes, layout: PlanLayout, work: Workload, gpu: Gpu, assumed: Assumptions) -> StepTime:
    """Predict a step of typical lengths."""
    lengths, count = work.typical, work.microbatches(layout.data, layout.micro_batch)
    batch = min(layout.micro_batch, -(-work.sequences // layout.data))
    student = student_shapes(lengths, count, batch)
    teacher = teacher_shapes(lengths, count, batch) if work.teacher else []
    # The last stage has the loss; the others are alike.
    traffic = step_traffic(sizes, layout, work, student, teacher, layout.pipeline - 1)
    own = _run(sizes, layout, work, gpu, assumed, student, traffic, "student")
    given = _run(sizes, layout, work, gpu, assumed, teacher, traffic, "teacher") if teacher else _Pass(0, 0, 0)
    swap = static_bytes(sizes, layout, work, 0).local / (gpu.host * assumed.host) if work.swaps_weights else 0
    update_traffic = _seconds(layout, gpu, assumed, (t for t in traffic if t.phase == "update"))
    seconds = {
        **_rollout(sizes, layout, work, gpu, assumed),
        "teacher": given.total + swap,
        "student": own.total,
        "update": update_traffic + _optimizer(sizes, layout, work, gpu, assumed),
    }
    trained = seconds["teacher"] + seconds["student"] + seconds["update"]
    flops = step_flops(
        sizes,
        [lengths.student] * work.sequences,
        [lengths.teacher] * work.sequences if teacher else [],
        work.sequences * lengths.response,
        layout.recompute,
        work.loss_recompute,
        work.adapters is not None,
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
    sizes: ModelSizes,
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
    linear, attention = _pass_factors(sizes, layout, work, phase)
    gemm = gpu.flops * (assumed.expert_gemm if sizes.experts else assumed.gemm)
    floor = linear * assumed.layer * (3 if sizes.experts else 1)
    each = (
        linear * linear_flops_per_token(sizes) * shape.tokens / (ways * gemm)
        + attention * attention_flops(sizes, shape.length) * shape.sequences / (ways * gpu.flops * assumed.attention)
        for shape in shapes
    )
    layer = sum(max(seconds, floor) for seconds in each) / len(shapes)
    products = 0
    if phase == "student":
        products = (4 if work.teacher else 3) + (2 if work.loss_recompute else 0) - (work.adapters is not None)
    head = products * head_flops(sizes, shapes[0].rows) / (ways * assumed.gemm * gpu.flops)
    stages = [count * layer for count in layout.stage_layers(sizes.layers)]
    stages[-1] += head
    slowest = max(stages)
    compute = len(shapes) * stages[0] if layout.pipeline == 1 else len(shapes) * sum(stages) / layout.pipeline
    waiting = len(shapes) * slowest - compute + (sum(stages) - slowest) / layout.virtual
    return _Pass(compute, waiting, _seconds(layout, gpu, assumed, (t for t in traffic if t.phase == phase)))


def _pass_factors(sizes: ModelSizes, layout: PlanLayout, work: Workload, phase: str) -> tuple[float, float]:
    """How many forward passes' worth of matrix products and of attention a layer does."""
    if phase == "teacher":
        return 1.0, 1.0
    fed = feed_forward_flops_per_token(sizes) / linear_flops_per_token(sizes)
    again = {"none": (0.0, 0.0), "selective": (fed, 0.0), "full": (1.0, 1.0)}[layout.recompute]
    backward = 2.0 if work.adapters is None else 1.0  # frozen weights get no gradient
    return 1.0 + backward + again[0], 1.0 + _ATTENTION_BACKWARD + again[1]


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


def _optimizer(sizes: ModelSizes, layout: PlanLayout, work: Workload, gpu: Gpu, assumed: Assumptions) -> float:
    owned = max(static_bytes(sizes, layout, work, stage).owned[0] for stage in (0, layout.pipeline - 1))
    return owned * _OPTIMIZER_BYTES / (gpu.memory_bandwidth * assumed.memory_bandwidth)


def _rollout(sizes: ModelSizes, layout: PlanLayout, work: Workload, gpu: Gpu, assumed: Assumptions) -> dict[str, float]:
    """Sampling: each decoding step reads the weights and the cache once; and the weights' way to the engines."""
    engines = work.engines or layout.gpus // work.engine_tensor
    here = -(-work.sequences // engines)
    batch = min(here, work.concurrency)
    waves = math.ceil(here / batch)
    lengths, ways = work.typical, work.engine_tensor
    active, total = sizes.active_parameters, sizes.parameters
    touched = min(total, batch * active) * work.item / ways  # few tokens do not reach all experts
    context = lengths.student_prompt + lengths.response / 2
    cache = batch * context * cache_bytes_per_token(sizes, work) / ways
    reading = (touched + cache) / (gpu.memory_bandwidth * assumed.memory_bandwidth)
    computing = 2 * active * batch / (ways * gpu.flops * assumed.gemm)
    overhead = sizes.layers * (assumed.eager_layer if work.engine == "embedded" else assumed.decode_layer)
    prefill = 2 * active * batch * lengths.student_prompt / (ways * gpu.flops * assumed.gemm)
    link = gpu.link * assumed.link if work.engine == "embedded" else gpu.network * assumed.network
    return {
        "sync": total * work.item / link,
        "rollout": waves * (prefill + lengths.response * (max(reading, computing) + overhead)),
    }
