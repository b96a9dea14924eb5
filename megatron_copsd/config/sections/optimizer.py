"""The optimiser, its schedule and the batch arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from megatron_copsd.config.settings import (
    Decay,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Problem,
    Settings,
    without_effect,
)

if TYPE_CHECKING:
    from megatron_copsd.config.schema import Config


class OptimizerSettings(Settings):
    """Megatron's Adam, its schedule and the batch arithmetic."""

    lr: float = Field(default=5e-6, gt=0, le=100, description="peak learning rate")
    min_lr: NonNegativeFloat = Field(default=0.0, description="learning rate at the end of the decay")
    warmup_steps: NonNegativeInt = Field(default=0, description="steps of linear warm-up")
    decay: Literal["constant", "linear", "cosine"] = Field(default="constant", description="shape after the warm-up")
    beta1: Decay = Field(default=0.9, description="Adam beta1")
    beta2: Decay = Field(default=0.999, description="Adam beta2")
    eps: PositiveFloat = Field(default=1e-8, description="Adam epsilon")
    weight_decay: NonNegativeFloat = Field(default=0.0, description="decoupled weight decay")
    clip_grad: NonNegativeFloat = Field(default=1.0, description="gradient norm cap; 0 is off")
    micro_batch_size: PositiveInt = Field(
        default=4, description="sequences per microbatch, where micro_batch_tokens is null"
    )
    micro_batch_tokens: PositiveInt | None = Field(
        default=None, description="tokens per microbatch, padding included; balances ranks and microbatches by tokens"
    )
    teacher_micro_batch_size: PositiveInt | None = Field(
        default=None, description="sequences per microbatch of the teacher; null: as the student's"
    )
    teacher_micro_batch_tokens: PositiveInt | None = Field(
        default=None,
        description="tokens per microbatch of the teacher; null: as teacher_micro_batch_size, or the student's",
    )
    packing: bool = Field(
        default=False, description="lay a microbatch's sequences behind each other instead of padding them"
    )
    skip_nonfinite: NonNegativeInt = Field(
        default=0, description="steps whose loss or gradient is not finite that may be passed over before the run stops"
    )
    distributed: bool = Field(default=True, description="shard optimiser state over data-parallel ranks")


def problems(config: Config) -> list[Problem]:
    """Return what is wrong with this section in the light of the others."""
    found: list[Problem] = []
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        rule = f"must not exceed optimizer.lr = {optimizer.lr}"
        found.append(Problem("optimizer.min_lr", optimizer.min_lr, rule, "Lower it."))
    if optimizer.warmup_steps >= config.run.steps:
        rule = f"must be below run.steps = {config.run.steps}"
        found.append(Problem("optimizer.warmup_steps", optimizer.warmup_steps, rule, "Lower it or train longer."))
    if optimizer.decay == "constant":
        rule, remedy = "with optimizer.decay = constant", "Remove it, or set decay: linear or cosine."
        found += without_effect("optimizer", optimizer, ["min_lr"], rule, remedy)
    if not config.method.uses_teacher:
        rule = f"with objective.name = {config.method.name}, which has no teacher"
        names = ["teacher_micro_batch_size", "teacher_micro_batch_tokens"]
        found += without_effect("optimizer", optimizer, names, rule)
    size = optimizer.teacher_micro_batch_size
    if size is not None and optimizer.teacher_micro_batch_tokens is not None:
        rule = "optimizer.teacher_micro_batch_tokens says how large the teacher's microbatches are"
        found.append(Problem("optimizer.teacher_micro_batch_size", size, rule, "Set one of the two to null."))
    return found


def idle(config: Config) -> list[Problem]:
    """Return what has no effect and is said, not refused: the settings that do are given beside it for one run."""
    if config.optimizer.micro_batch_tokens is None:
        return []
    return without_effect("optimizer", config.optimizer, ["micro_batch_size"], "where micro_batch_tokens is set")
