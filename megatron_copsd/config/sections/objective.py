"""What a step minimises, and the teacher it is pulled towards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from megatron_copsd.config.method import MethodName, MethodTraits
from megatron_copsd.config.settings import (
    Mebibytes,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Problem,
    Settings,
    without_effect,
)

if TYPE_CHECKING:
    from megatron_copsd.config.schema import Config

# What a loss has no use for that does not compare whole distributions, and what one without a teacher has none for.
_OVER_VOCABULARY = ("divergence", "jsd_weight", "entry_clip", "token_clip", "teacher_top_k")
_TOWARDS_TEACHER = (*_OVER_VOCABULARY, "temperature")


Reduction = Literal["token_mean", "sequence_mean", "subset_mean"]


class ObjectiveSettings(Settings):
    """Which objective the step minimises."""

    name: MethodName = Field(
        default="copsd",
        description="copsd: towards the teacher that sees the English problem and solution; opsd: that sees the "
        "solution alone; sampled_token: as copsd, at the sampled tokens alone; grpo: by the reward of the answer; sft: "
        "the solutions of the data",
    )


class PolicySettings(Settings):
    """The policy gradient: what a response's reward is worth, and how far a step may go on it."""

    advantage: Literal["standardized", "centered", "reward"] = Field(
        default="standardized",
        description="of a reward within its prompt's group; standardized: less the mean, over the sample standard "
        "deviation (GRPO); centered: less the mean (Dr. GRPO); reward: as it is",
    )
    ratio: Literal["one", "sampled"] = Field(
        default="one",
        description="of trained to sampling policy; one: responses are samples of the weights that they change; "
        "sampled: from the engine's log-probabilities, clipped, as rollout.ahead needs it",
    )
    clip_low: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.2, description="ratio sampled: no gain below a ratio of 1 - clip_low"
    )
    clip_high: PositiveFloat = Field(default=0.2, description="ratio sampled: nor above 1 + clip_high; DAPO has 0.28")


class TeacherSettings(Settings):
    """Whose weights the teacher uses."""

    weights: Literal["frozen", "live", "ema"] = Field(
        default="frozen",
        description="frozen: the initial weights; live: the student's current ones; ema: a moving average",
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.999, description="per-step decay of the moving average"
    )
    cache: Literal["auto", "device", "host"] = Field(
        default="auto", description="where the teacher's hidden states wait for the student; auto: by cache_mb"
    )
    cache_mb: NonNegativeFloat = Field(
        default=4096.0, description="cache auto: MiB of a process kept on its device, the rest goes to host memory"
    )

    @property
    def device_cache_bytes(self) -> float:
        """Bytes of hidden states that may stay on the model's device; the rest lies in host memory."""
        return {"device": float("inf"), "host": 0.0, "auto": self.cache_mb * 2**20}[self.cache]


class LossSettings(Settings):
    """The divergence between teacher and student."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        default="forward_kl",
        description="forward_kl: KL(teacher||student); reverse_kl: KL(student||teacher); jsd: mixture",
    )
    jsd_weight: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="teacher's weight in the jsd mixture"
    )
    temperature: PositiveFloat = Field(default=1.0, description="divides the logits of both in the loss")
    entry_clip: PositiveFloat | None = Field(default=None, description="cap of each vocabulary entry before the sum")
    token_clip: PositiveFloat | None = Field(default=None, description="cap of a token's divergence after the sum")
    reduction: Reduction = Field(
        default="token_mean",
        description="token_mean: over all response tokens; sequence_mean: over responses, of the means over their "
        "tokens; subset_mean (sft): sum over the data's subsets of such means, exact over an epoch",
    )
    scratch_mb: Mebibytes | None = Field(
        default=None,
        description="budget of the logits scratch, in MiB; null: 1280 on CUDA (streaming: 128), 192 rows of logits on "
        "CPU",
    )
    teacher_top_k: PositiveInt | None = Field(
        default=None,
        description="cut the teacher to its k likeliest tokens, an approximation; null: the whole vocabulary",
    )
    implementation: Literal["auto", "torch", "chunk", "streaming"] = Field(
        default="auto",
        description="torch: chunks of rows; chunk: the same in Triton; streaming: Triton, no logits in memory at "
        "all, more products; auto: by device, dtype and budget",
    )
    recompute: bool = Field(
        default=False,
        description="make gradients in the backward pass, from recomputed logits: less memory in between, slower",
    )

    @property
    def scratch_bytes(self) -> int | None:
        """``scratch_mb`` in bytes."""
        return None if self.scratch_mb is None else int(self.scratch_mb * 2**20)


def problems(config: Config) -> list[Problem]:
    """Return what is wrong with these sections in the light of the others."""
    found: list[Problem] = []
    loss, teacher, method = config.loss, config.teacher, config.method
    found += _policy_problems(config.policy, method)
    if loss.reduction == "subset_mean" and method.samples_responses:
        rule = f"objective.name = {method.name} has rollouts of no subset"
        found.append(Problem("loss.reduction", loss.reduction, rule, "Choose another, or train with sft."))
    if not method.uses_teacher:
        rule = f"with objective.name = {method.name}, which has no teacher"
        found += without_effect("teacher", teacher, TeacherSettings.model_fields, rule)
        return [*found, *without_effect("loss", loss, _TOWARDS_TEACHER, rule)]
    if not method.compares_vocabulary:
        rule = f"with objective.name = {method.name}, which compares the sampled tokens alone"
        found += without_effect("loss", loss, _OVER_VOCABULARY, rule)
    elif loss.divergence == "reverse_kl" and loss.teacher_top_k is not None:
        rule = "KL(student||teacher) is infinite where a cut teacher has no probability"
        found.append(Problem("loss.teacher_top_k", loss.teacher_top_k, rule, "Remove it, or use another divergence."))
    if method.compares_vocabulary and loss.divergence != "jsd":
        rule = f"with loss.divergence = {loss.divergence}"
        found += without_effect("loss", loss, ["jsd_weight"], rule, "Remove it, or set divergence: jsd.")
    if teacher.weights != "ema":
        rule = f"with teacher.weights = {teacher.weights}"
        found += without_effect("teacher", teacher, ["ema_decay"], rule, "Remove it, or set weights: ema.")
    if teacher.cache != "auto":
        rule = f"with teacher.cache = {teacher.cache}"
        found += without_effect("teacher", teacher, ["cache_mb"], rule, "Remove it, or set cache: auto.")
    return found


def _policy_problems(policy: PolicySettings, method: MethodTraits) -> list[Problem]:
    if not method.compares_samples:
        rule = f"with objective.name = {method.name}, which is no policy gradient"
        return without_effect("policy", policy, PolicySettings.model_fields, rule)
    if policy.ratio == "one":
        remedy = "Remove it, or set ratio: sampled."
        return without_effect("policy", policy, ["clip_low", "clip_high"], "with policy.ratio = one", remedy)
    return []
