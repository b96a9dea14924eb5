"""Bytes on one GPU, part by part, in each phase of a step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from copsd_kernels.scratch import WORK_BUFFERS, ChunkPlan, ScratchShape, plan_chunks
from megatron_copsd.architecture import Architecture
from megatron_copsd.plan.activations import (
    brought_back_bytes,
    edge_bytes,
    exchanged_bytes,
    layer_tokens,
    stored_bytes,
)
from megatron_copsd.plan.hardware import Assumptions, Gpu
from megatron_copsd.plan.parameters import (
    Adapters,
    Buffer,
    Parameter,
    StagePart,
    adapter_parameters,
    flat_buffer,
    stage_parameters,
)
from megatron_copsd.plan.workload import MicrobatchShape, PlanLayout, Workload, student_shapes, teacher_shapes

PHASES = ("rollout", "teacher", "student", "update")
_FLOAT = 4
_GIB = 1 << 30

# What makes each part smaller.
_REMEDIES = {
    "weights": "Cut the model over more GPUs: parallel.tensor, parallel.pipeline.",
    "gradients, fp32": "Cut the model over more GPUs: parallel.tensor, parallel.pipeline.",
    "optimizer state": "Shard it over more replicas: optimizer.distributed=true, more GPUs.",
    "activations": "Lower optimizer.micro_batch_size or prompt.max_student_tokens, or raise parallel.tensor.",
    "tensors between stages": "Lower optimizer.micro_batch_size.",
    "working tensors of one layer": "Lower optimizer.micro_batch_size or prompt.max_teacher_tokens.",
    "student's weights, aside": "Set teacher.weights=live, or cut the model over more GPUs.",
    "averaged teacher, fp32": "Set teacher.weights=frozen or live, or cut the model over more GPUs.",
    "loss scratch": "Lower loss.scratch_mb.",
    "response rows and their gradient": "Lower optimizer.micro_batch_size.",
    "teacher's hidden states [R, H]": "Lower teacher.cache_mb, or set teacher.cache=host.",
    "teacher's output weight": "Set teacher.weights=live, or raise parallel.tensor.",
    "weight sync": "Lower rollout.bucket_mb.",
    "embedded engine's model": "Set rollout.engine=sglang, with servers on other GPUs.",
    "embedded engine's cache": "Lower rollout.batch_size.",
    "rollout server": "Put the servers on other GPUs (sglang.release_memory=false), or raise sglang.tensor.",
    "framework reserve": "Nothing gives this back.",
}


@dataclass(frozen=True)
class Part:
    """One use of memory.

    Attributes:
        name: for people.
        bytes: on one GPU.
        phases: in which it is held.
    """

    name: str
    bytes: int
    phases: tuple[str, ...] = PHASES


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of the fullest GPU.

    Attributes:
        stage: its pipeline stage.
        parts: what it holds.
        host: bytes on the host for each GPU.
        capacity: bytes of the GPU.
    """

    stage: int
    parts: tuple[Part, ...]
    host: int
    capacity: int

    def in_phase(self, phase: str) -> int:
        """Bytes held in a phase."""
        return sum(part.bytes for part in self.parts if phase in part.phases)

    @property
    def fullest_phase(self) -> str:
        """The phase that holds most."""
        return max(PHASES, key=self.in_phase)

    @property
    def peak(self) -> int:
        """Bytes held in the fullest phase."""
        return self.in_phase(self.fullest_phase)

    @property
    def margin(self) -> int:
        """Bytes left at the peak; negative where the layout does not fit."""
        return self.capacity - self.peak

    @property
    def fits(self) -> bool:
        """Whether every phase fits."""
        return self.margin >= 0


@dataclass(frozen=True)
class StaticBytes:
    """What a rank holds through all phases, in bytes: parameters, fp32 gradients, and optimizer state of one replica.

    Attributes:
        weights: parameters, in Megatron's flat buffer where the optimizer is distributed.
        gradients: fp32 buffer.
        optimizer: both moments, and the fp32 master copy of parameters that are not fp32 themselves; of the replica
            that owns most.
        owned: parameters that each replica keeps optimizer state for.
        local: parameters of the model alone, without the buffer's padding.
        buffer: parameters that are trained, with it; what the distributed optimizer gathers.
    """

    weights: int
    gradients: int
    optimizer: int
    owned: tuple[int, ...]
    local: int
    buffer: int


def static_bytes(model: Architecture, layout: PlanLayout, work: Workload, stage: int) -> StaticBytes:
    """Return what a rank of a stage holds through all phases; with VPP 1 exactly what Megatron allocates."""
    replicas = layout.shards, layout.expert_replicas
    part = layout.part(model, stage)
    return _static_bytes(model, part, work.adapters, replicas, layout.distributed_optimizer, work.item)


@lru_cache(maxsize=4096)
def _static_bytes(
    model: Architecture,
    part: StagePart,
    adapters: Adapters | None,
    replicas: tuple[int, int],
    distributed: bool,
    item: int,
) -> StaticBytes:
    held = stage_parameters(model, part)
    trained = held if adapters is None else adapter_parameters(model, part, adapters)
    dense, experts = (
        _buffer([p for p in trained if p.expert is expert], count, distributed)
        for expert, count in zip((False, True), replicas, strict=True)
    )
    elements = dense.elements + experts.elements
    each = 2 * _FLOAT + (_FLOAT if item != _FLOAT else 0)
    local = item * sum(parameter.elements for parameter in held)
    return StaticBytes(
        weights=item * elements + (0 if adapters is None else local),
        gradients=_FLOAT * elements,
        optimizer=each * (max(dense.owned) + max(experts.owned)),
        owned=dense.owned,
        local=local,
        buffer=item * elements,
    )


def _buffer(parameters: list[Parameter], replicas: int, distributed: bool) -> Buffer:
    return flat_buffer(parameters, replicas, distributed) if parameters else Buffer(0, (0,))


def loss_scratch(model: Architecture, layout: PlanLayout, work: Workload, rows: int) -> ChunkPlan:
    """Return the loss's buffers for a microbatch of so many response rows; the first tensor rank's, which has most.

    Raises:
        UserError: the budget does not hold one row.
    """
    width = model.padded_vocab(layout.tensor) // layout.tensor
    native = work.device == "cuda" or work.item == _FLOAT
    shape = ScratchShape(
        views=2 if work.teacher else 1,
        rows=rows,
        width=width,
        columns=min(width, model.vocab_size),
        hidden=model.hidden,
        item=_FLOAT,
        operand_item=work.item if native else _FLOAT,
        weight_item=work.item,
        work_buffers=WORK_BUFFERS["chunk" if work.device == "cuda" else "torch"],
        differentiate=True,
        device=work.device,
    )
    return plan_chunks(shape, work.scratch_bytes)


def in_flight(layout: PlanLayout, stage: int, microbatches: int) -> float:
    """Microbatches whose activations a stage holds at once, as a share of all its layers (1F1B, arXiv 2104.04473)."""
    if layout.virtual == 1:
        return min(layout.pipeline - stage, microbatches)
    chunks = 2 * (layout.pipeline - stage - 1) + (layout.virtual - 1) * layout.pipeline + 1
    return min(chunks, microbatches * layout.virtual) / layout.virtual


def activation_bytes(
    model: Architecture, layout: PlanLayout, work: Workload, shape: MicrobatchShape, stage: int, microbatches: int
) -> int:
    """Bytes that autograd holds on a stage at once, over all microbatches in flight, the loss aside."""
    stored = stored_bytes(model, layout, work, shape, stage) + edge_bytes(model, layout, work, shape, stage)
    return round(in_flight(layout, stage, microbatches) * stored)


def memory_plan(model: Architecture, layout: PlanLayout, work: Workload, gpu: Gpu, assumed: Assumptions) -> MemoryPlan:
    """Return the memory of the fullest GPU.

    Raises:
        UserError: the loss's budget does not hold one row.
    """
    stages = {0, layout.pipeline // 2, layout.pipeline - 1}
    plans = [_stage_memory(model, layout, work, gpu, assumed, stage) for stage in sorted(stages)]
    return max(plans, key=lambda plan: plan.peak)


def _stage_memory(
    model: Architecture, layout: PlanLayout, work: Workload, gpu: Gpu, assumed: Assumptions, stage: int
) -> MemoryPlan:
    held = static_bytes(model, layout, work, stage)
    microbatches = work.microbatches(layout.data, layout.micro_batch)
    student = student_shapes(work.longest, microbatches, layout.micro_batch)[0]
    teacher = teacher_shapes(work.longest, microbatches, layout.micro_batch)[0]
    flying = in_flight(layout, stage, microbatches)
    last = stage == layout.pipeline - 1
    parts = [
        Part("weights", held.weights),
        Part("gradients, fp32", held.gradients),
        Part("optimizer state", held.optimizer),
        Part("activations", activation_bytes(model, layout, work, student, stage, microbatches), ("student",)),
        Part(
            "tensors between stages", round(flying * exchanged_bytes(model, layout, work, student, stage)), ("student",)
        ),
        Part("working tensors of one layer", _working(model, layout, work, student, stage), ("student",)),
        Part("working tensors of one layer", _forward_only(model, layout, work, teacher), ("teacher",)),
    ]
    if work.swaps_weights:
        parts.append(Part("student's weights, aside", held.local, ("teacher",)))
    if work.teacher == "ema":
        parts.append(Part("averaged teacher, fp32", held.local // work.item * _FLOAT))
    if last:
        parts += _loss_parts(model, layout, work, student, microbatches)
    parts += _engine_parts(model, work, gpu)
    parts.append(Part("framework reserve", assumed.framework + round(assumed.fragmentation * gpu.memory)))
    host = held.local if work.teacher == "frozen" and work.swaps_weights else 0
    if last and work.teacher:
        host += round(max(_teacher_rows_bytes(model, work, student, microbatches) - work.teacher_cache_bytes, 0))
    return MemoryPlan(stage, tuple(parts), host, gpu.memory)


def _loss_parts(
    model: Architecture, layout: PlanLayout, work: Workload, student: MicrobatchShape, microbatches: int
) -> list[Part]:
    row = model.hidden * work.item
    rows = -(-student.rows // layout.context)
    parts = [
        Part("loss scratch", loss_scratch(model, layout, work, rows).bytes, ("student",)),
        # The rows themselves, their gradient in fp32, and what autograd gets of it.
        Part("response rows and their gradient", rows * (2 * row + model.hidden * _FLOAT), ("student",)),
    ]
    if work.teacher:
        kept = min(_teacher_rows_bytes(model, work, student, microbatches), work.teacher_cache_bytes)
        parts.append(Part("teacher's hidden states [R, H]", round(kept), ("teacher", "student")))
    if work.swaps_weights:
        shard = model.padded_vocab(layout.tensor) // layout.tensor * row
        parts.append(Part("teacher's output weight", shard, ("teacher", "student")))
    return parts


def _teacher_rows_bytes(model: Architecture, work: Workload, student: MicrobatchShape, microbatches: int) -> int:
    """Bytes of the teacher's hidden states of a step; every context rank keeps those of whole sequences."""
    return microbatches * student.rows * model.hidden * work.item


def _engine_parts(model: Architecture, work: Workload, gpu: Gpu) -> list[Part]:
    largest = model.padded_vocab(1) * model.hidden * work.item
    # One tensor gathered and put together, and the bucket it goes into.
    parts = [Part("weight sync", 2 * largest + work.bucket_bytes, ("rollout",))]
    whole = model.parameters * work.item // work.engine_tensor
    longest = work.longest.student
    cache = work.concurrency * longest * cache_bytes_per_token(model, work) // work.engine_tensor
    if work.engine == "embedded":
        parts += [Part("embedded engine's model", whole), Part("embedded engine's cache", cache, ("rollout",))]
    elif work.shares_gpus:
        parts.append(Part("rollout server", whole + min(cache, gpu.memory // 5), ("rollout",)))
    return parts


def cache_bytes_per_token(model: Architecture, work: Workload) -> int:
    """Bytes of keys and values of one token, over all layers."""
    return 2 * model.layers * model.kv_width * work.item


def _working(model: Architecture, layout: PlanLayout, work: Workload, shape: MicrobatchShape, stage: int) -> int:
    """What a backward pass of one layer holds besides: gradients of its widest tensors, and what it ran again."""
    again = brought_back_bytes(model, layout, work, shape, stage)
    return again + _forward_only(model, layout, work, shape)


def _forward_only(model: Architecture, layout: PlanLayout, work: Workload, shape: MicrobatchShape) -> int:
    """Largest tensors that one layer holds at once: its input and output, the gated halves and their product."""
    tokens = layer_tokens(layout, shape)
    wide = model.ffn // layout.tensor if not model.experts else model.experts_per_token * model.moe_ffn
    return tokens.inside * (3 * wide + 3 * model.hidden) * work.item


def verdict(memory: MemoryPlan) -> list[str]:
    """Say whether the layout fits; if not, the three parts of the fullest phase that take most, with a remedy each."""
    phase, peak, capacity = memory.fullest_phase, memory.peak / _GIB, memory.capacity / _GIB
    if memory.fits:
        return [f"fits: {peak:.1f} of {capacity:.1f} GiB at the peak, in the {phase} phase; {capacity - peak:.1f} left"]
    parts = sorted((p for p in memory.parts if phase in p.phases), key=lambda part: -part.bytes)
    lines = [f"does not fit: the {phase} phase needs {peak:.1f} of {capacity:.1f} GiB, {peak - capacity:.1f} too many"]
    return lines + [f"  {part.name}: {part.bytes / _GIB:.1f} GiB. {_REMEDIES[part.name]}" for part in parts[:3]]
