"""How responses are sampled: for training, and to evaluate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from megatron_copsd.config.settings import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Problem,
    Settings,
)

if TYPE_CHECKING:
    from megatron_copsd.config.schema import Config


class RolloutSettings(Settings):
    """How responses are sampled."""

    engine: Literal["embedded", "sglang"] = Field(
        default="embedded",
        description="embedded: transformers generate in each process; sglang: servers (section sglang)",
    )
    ahead: Literal[0, 1] = Field(
        default=0, description="1: sample the next step's responses while this step trains, one weight version behind"
    )
    agreement_every: NonNegativeInt = Field(
        default=0,
        description="compare the engine's log-probabilities with the trainer's on every n-th step; 0 is never",
    )
    agreement_limit: PositiveFloat = Field(
        default=0.5,
        description="largest difference of a token's log-probability, in nats, before a warning (or an error)",
    )
    agreement_failure: Literal["warn", "stop"] = Field(
        default="warn", description="what a difference above the limit does"
    )
    prompts_per_step: PositiveInt = Field(default=32, description="problems drawn for one step")
    samples_per_prompt: PositiveInt = Field(default=1, description="responses sampled for each problem")
    max_response_tokens: PositiveInt = Field(default=1024, description="longest response")
    temperature: PositiveFloat = Field(default=1.0, description="sampling temperature")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(default=1.0, description="nucleus sampling; 1 is off")
    top_k: NonNegativeInt = Field(default=0, description="sample among the k likeliest tokens; 0 is off")
    stop_token_ids: tuple[NonNegativeInt, ...] = Field(
        default=(),
        description="ids that end a response; when empty, those of the model's generation_config.json, config.json and "
        "tokenizer together",
    )
    batch_size: PositiveInt = Field(default=64, description="sequences generated at once by one process")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="dtype of the engine; the model's by default"
    )
    bucket_mb: PositiveFloat = Field(default=256.0, description="weight sync: bytes handed over at once, in MiB")
    save_every: NonNegativeInt = Field(default=1, description="write the rollouts of every n-th step; 0 is never")


class EvalSettings(Settings):
    """Accuracy on the held-out sources."""

    every: NonNegativeInt = Field(default=0, description="steps between evaluations; 0 is only when asked for")
    at_start: bool = Field(default=False, description="evaluate before the first step")
    at_end: bool = Field(default=False, description="evaluate after the last step")
    samples: PositiveInt = Field(default=1, description="responses per problem; 1 with temperature 0 is greedy")
    temperature: NonNegativeFloat = Field(default=0.0, description="0 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(default=1.0, description="nucleus sampling; 1 is off")
    max_response_tokens: PositiveInt | None = Field(
        default=None, description="longest response; the rollout's by default"
    )


def problems(config: Config) -> list[Problem]:
    """Return what is wrong with these sections in the light of the others."""
    found: list[Problem] = []
    rollout, method = config.rollout, config.method
    if method.compares_samples and rollout.samples_per_prompt < 2:
        rule = f"{method.name} compares the samples of a prompt with each other and needs at least 2"
        found.append(Problem("rollout.samples_per_prompt", rollout.samples_per_prompt, rule, "Set 8, for example."))
    if not method.samples_responses and rollout.samples_per_prompt != 1:
        rule = f"{method.name} has one response a problem, from the data"
        found.append(Problem("rollout.samples_per_prompt", rollout.samples_per_prompt, rule, "Set 1."))
    if rollout.engine != "sglang" and rollout.ahead:
        rule = "the embedded engine samples in the trainer's own processes and can't work while they train"
        found.append(Problem("rollout.ahead", rollout.ahead, rule, "Set 0, or engine: sglang."))
    evaluates = config.eval.every or config.eval.at_start or config.eval.at_end
    if evaluates and not config.data.eval:
        found.append(Problem("data.eval", [], "evaluation is asked for and there is no held-out source", "Add one."))
    if config.eval.samples > 1 and config.eval.temperature == 0:
        rule = f"with temperature 0 all eval.samples = {config.eval.samples} responses are the same"
        found.append(Problem("eval.temperature", 0, rule, "Raise it, or set samples: 1."))
    return found
