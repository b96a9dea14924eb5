"""What a step has to do: how many sequences of which lengths, with which teacher, loss and engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_copsd.config.schema import Config
from megatron_copsd.plan.hardware import GPUS_PER_NODE
from megatron_copsd.plan.layout import ITEM_BYTES, Dtype, Implementation
from megatron_copsd.plan.sizes import Adapters

_MIB = 1 << 20


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
    return Workload(
        sequences=rollout.prompts_per_step * rollout.samples_per_prompt,
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
