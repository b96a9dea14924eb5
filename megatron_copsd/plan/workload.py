"""What is planned: the work of a step, how it and the model are cut over GPUs, and what can't be planned or cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megatron_copsd.architecture import Architecture, process_multiple, stage_layers
from megatron_copsd.config.schema import Config, ParallelSettings
from megatron_copsd.config.sections.model import parallel_problems
from megatron_copsd.config.sections.sdrrl import QUESTIONS
from megatron_copsd.config.settings import Problem
from megatron_copsd.plan.hardware import GPUS_PER_NODE
from megatron_copsd.plan.parameters import Adapters, StagePart

_MIB = 1 << 20

Recompute = Literal["none", "selective", "full"]
Implementation = Literal["torch", "transformer_engine"]
Dtype = Literal["float32", "bfloat16"]

ITEM_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class PlanLayout:
    """One way to cut.

    Attributes:
        gpus: processes of the trainer, one a GPU.
        tensor, sequence: tensor-parallel size, and whether norms and residuals are cut over it too.
        pipeline, virtual: pipeline stages, and virtual stages on each.
        first_layers, last_layers: layers of the first and last stage where the split is uneven; None: as the rest.
        context: ranks that share each sequence.
        expert: ranks that share the experts.
        recompute: activations that the backward pass computes again.
        recompute_layers: under ``full``, how many layers of each model chunk; None: all.
        micro_batch: sequences of a microbatch.
        distributed_optimizer: whether optimizer state is sharded over replicas.
    """

    gpus: int
    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual: int = 1
    first_layers: int | None = None
    last_layers: int | None = None
    context: int = 1
    expert: int = 1
    recompute: Recompute = "none"
    micro_batch: int = 1
    distributed_optimizer: bool = True
    recompute_layers: int | None = None

    @cached_property
    def settings(self) -> ParallelSettings:
        """The section of the settings that asks for this layout."""
        return ParallelSettings(
            tensor=self.tensor,
            sequence=self.sequence,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual,
            first_stage_layers=self.first_layers,
            last_stage_layers=self.last_layers,
            context=self.context,
            expert=self.expert,
            recompute=self.recompute,
            recompute_layers=self.recompute_layers,
        )

    @property
    def data(self) -> int:
        """Replicas that see different sequences."""
        return self.gpus // (self.tensor * self.pipeline * self.context)

    @property
    def shards(self) -> int:
        """Ranks over which dense gradients are reduced and optimizer state is sharded."""
        return self.data * self.context

    @property
    def expert_replicas(self) -> int:
        """Ranks with the same experts; experts are not cut over tensor ranks but spread over them."""
        return self.gpus // (self.pipeline * self.expert)

    @property
    def norm_shards(self) -> int:
        """Ranks over which the tokens of norms and residuals are cut, besides context parallelism."""
        return self.tensor if self.sequence else 1

    def part(self, model: Architecture, stage: int) -> StagePart:
        """Which part of the model a rank of a stage holds."""
        return StagePart(
            layers=stage_layers(model.layers, self.settings)[stage],
            first=stage == 0,
            last=stage == self.pipeline - 1,
            pipeline=self.pipeline,
            tensor=self.tensor,
            expert=self.expert,
        )

    def describe(self) -> str:
        """Return the whole layout in a few words."""
        share = f" of {self.recompute_layers} layers a chunk" if self.recompute_layers else ""
        return f"{self.cuts()}, microbatch {self.micro_batch}, recompute {self.recompute}{share}"

    def cuts(self) -> str:
        """Return how model and batch are cut, sizes of 1 left out."""
        names = {
            "TP": self.tensor,
            "PP": self.pipeline,
            "VPP": self.virtual,
            "CP": self.context,
            "EP": self.expert,
            "DP": self.data,
        }
        words = [f"{name}{size}" for name, size in names.items() if size > 1] or ["one GPU"]
        if self.sequence:
            words[0] = words[0].replace("TP", "TP+SP")
        ends = {"first": self.first_layers, "last": self.last_layers}
        if any(ends.values()):
            words.append(f"({', '.join(f'{name} {count}' for name, count in ends.items() if count)} layers)")
        return " ".join(words)


@dataclass(frozen=True)
class Lengths:
    """Tokens of one sequence.

    Attributes:
        student_prompt, teacher_prompt, response: tokens of each part.
    """

    student_prompt: int
    teacher_prompt: int
    response: int

    @property
    def student(self) -> int:
        """Tokens of the student's sequence."""
        return self.student_prompt + self.response

    @property
    def teacher(self) -> int:
        """Tokens of the teacher's sequence."""
        return self.teacher_prompt + self.response


@dataclass(frozen=True)
class Workload:
    """One step's work and the settings that decide its memory and time.

    Attributes:
        sequences: rollouts of a step, over all replicas.
        longest: lengths that the configuration admits, which memory must hold.
        typical: lengths that the time is predicted for.
        dtype: of parameters and activations.
        implementation: of the layers.
        device: ``cuda``, or ``cpu`` for the checks that need no GPU.
        teacher: whose weights the teacher uses; None for objectives without one.
        loss_recompute: whether the loss makes its gradients in the backward pass.
        scratch_bytes: budget of the loss; None for the device's default.
        bucket_bytes: of the weight sync.
        engine, engine_tensor, engines: what samples, GPUs of one engine, how many; 0 engines: one a trainer process.
        shares_gpus: whether the engines live on the trainer's GPUs.
        concurrency: sequences that an engine decodes at once.
        adapters: what is trained in place of the model; None trains the whole.
        teacher_cache_bytes: of the teacher's hidden states that may stay on a GPU.
    """

    sequences: int
    longest: Lengths
    typical: Lengths
    dtype: Dtype
    implementation: Implementation
    device: Literal["cpu", "cuda"]
    teacher: Literal["frozen", "live", "ema"] | None
    loss_recompute: bool
    scratch_bytes: int | None
    bucket_bytes: int
    engine: Literal["embedded", "sglang"]
    engine_tensor: int
    engines: int
    shares_gpus: bool
    concurrency: int
    adapters: Adapters | None = None
    teacher_cache_bytes: float = math.inf

    @property
    def swaps_weights(self) -> bool:
        """Whether the teacher's weights are put into the model; with adapters the frozen teacher is the base model."""
        return self.teacher == "ema" or (self.teacher == "frozen" and self.adapters is None)

    @property
    def item(self) -> int:
        """Bytes of a parameter and of an activation."""
        return ITEM_BYTES[self.dtype]

    def microbatches(self, data: int, micro_batch: int) -> int:
        """Microbatches of one replica."""
        own = -(-self.sequences // data)
        return max(1, -(-own // micro_batch))


@dataclass(frozen=True)
class MicrobatchShape:
    """One microbatch of one view as it is laid out.

    Attributes:
        sequences: B.
        length: T, padding included.
        rows: R, response rows.
    """

    sequences: int
    length: int
    rows: int

    @property
    def tokens(self) -> int:
        """B * T."""
        return self.sequences * self.length


def student_shapes(lengths: Lengths, count: int, micro_batch: int) -> Sequence[MicrobatchShape]:
    """Return ``count`` equal microbatches of the student's view."""
    return [MicrobatchShape(micro_batch, lengths.student, micro_batch * lengths.response)] * count


def teacher_shapes(lengths: Lengths, count: int, micro_batch: int) -> Sequence[MicrobatchShape]:
    """Return ``count`` equal microbatches of the teacher's view."""
    return [MicrobatchShape(micro_batch, lengths.teacher, micro_batch * lengths.response)] * count


def workload_from(config: Config, gpus: int, fill: float = 1.0) -> Workload:
    """Read a step's work from a configuration.

    Args:
        config: settings.
        gpus: of the trainer, whose nodes each start ``sglang.servers``.
        fill: typical prompts and responses as a share of the longest that the settings admit.
    """
    prompt, rollout, sglang = config.prompt, config.rollout, config.sglang
    longest = Lengths(prompt.max_student_tokens, prompt.max_teacher_tokens, rollout.max_response_tokens)
    typical = Lengths(
        *(max(1, round(n * fill)) for n in (longest.student_prompt, longest.teacher_prompt, longest.response))
    )
    embedded = not config.trains_with_servers
    implementation = config.model.implementation
    if implementation == "auto":
        implementation = "torch" if config.model.dtype == "float32" else "transformer_engine"
    # A draw of such a source is a question with its variants.
    variants = max(
        len(QUESTIONS if source.subsets is None else [name for name in source.subsets if name in QUESTIONS]) or 1
        if source.layout == "subsets"
        else 1
        for source in config.data.train
    )
    return Workload(
        sequences=rollout.prompts_per_step * rollout.samples_per_prompt * variants,
        longest=longest,
        typical=typical,
        dtype=config.model.dtype,
        implementation=implementation,
        device="cuda",
        teacher=config.teacher.weights if config.method.uses_teacher else None,
        loss_recompute=config.loss.recompute,
        scratch_bytes=config.loss.scratch_bytes,
        bucket_bytes=int(rollout.bucket_mb * _MIB),
        engine="embedded" if embedded else "sglang",
        engine_tensor=1 if embedded else sglang.tensor,
        engines=0 if embedded else (len(sglang.urls) or sglang.servers * -(-gpus // GPUS_PER_NODE)),
        shares_gpus=embedded or sglang.release_memory,
        concurrency=rollout.batch_size if embedded else sglang.concurrency,
        adapters=Adapters(config.lora.rank, config.lora.targets) if config.lora.rank else None,
        teacher_cache_bytes=config.teacher.device_cache_bytes,
    )


def layout_from(config: Config, gpus: int) -> PlanLayout:
    """Read the layout that a configuration asks for."""
    parallel = config.parallel
    return PlanLayout(
        gpus=gpus,
        tensor=parallel.tensor,
        sequence=parallel.sequence,
        pipeline=parallel.pipeline,
        virtual=parallel.virtual_pipeline,
        first_layers=parallel.first_stage_layers,
        last_layers=parallel.last_stage_layers,
        context=parallel.context,
        expert=parallel.expert,
        recompute=parallel.recompute,
        micro_batch=config.optimizer.micro_batch_size,
        distributed_optimizer=config.optimizer.distributed,
        recompute_layers=parallel.recompute_layers,
    )


def layout_problems(model: Architecture, layout: PlanLayout) -> list[Problem]:
    """Return every reason why no run of this layout could start."""
    contradictions = parallel_problems(layout.settings)
    if contradictions:
        return contradictions
    need, rule = process_multiple(layout.settings)
    found: list[Problem] = []
    if layout.gpus % need:
        remedy = f"Use {need}, or another layout (--search)."
        found.append(Problem("number of GPUs (--gpus)", layout.gpus, rule, remedy))
    return found + model.parallel_problems(layout.settings)


def unplanned(config: Config) -> list[Problem]:
    """Return every setting that changes a step in a way the plan does not know."""
    found: list[Problem] = []
    optimizer = config.optimizer
    if optimizer.packing:
        rule = "the plan is for padded microbatches, which are no smaller"
        found.append(Problem("optimizer.packing", True, rule, "Plan with optimizer.packing=false."))
    if optimizer.micro_batch_tokens is not None:
        longest = config.prompt.max_student_tokens + config.rollout.max_response_tokens
        held = max(1, optimizer.micro_batch_tokens // longest)
        rule = f"the plan is for microbatches of so many sequences; of the longest these hold {held}"
        remedy = f"Plan with optimizer.micro_batch_tokens=null optimizer.micro_batch_size={held}."
        found.append(Problem("optimizer.micro_batch_tokens", optimizer.micro_batch_tokens, rule, remedy))
    for name in ("teacher_micro_batch_size", "teacher_micro_batch_tokens"):
        value = getattr(optimizer, name)
        if value is not None:
            rule = "the plan is for microbatches of the teacher that hold as many sequences as the student's"
            found.append(Problem(f"optimizer.{name}", value, rule, f"Plan with optimizer.{name}=null."))
    if config.parallel.overlap_grad_reduce:
        rule = "the plan leaves out the second gradient of the output weight that this takes"
        remedy = "Plan with parallel.overlap_grad_reduce=false."
        found.append(Problem("parallel.overlap_grad_reduce", True, rule, remedy))
    if config.loss.implementation == "streaming":
        rule = "the plan is for the loss's buffers of chunks, which are no smaller"
        found.append(Problem("loss.implementation", "streaming", rule, "Plan with loss.implementation=chunk."))
    return found
