"""How responses are sampled: for training, and to evaluate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from megatron_copsd.config.sections.data import Thinking
from megatron_copsd.config.settings import (
    Count,
    Mebibytes,
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
    prompts_per_step: Count = Field(
        default=32, description="problems drawn for one step; with layout subsets, groups of variants"
    )
    samples_per_prompt: Count = Field(default=1, description="responses sampled for each problem")
    max_response_tokens: PositiveInt = Field(default=1024, description="longest response")
    temperature: PositiveFloat = Field(default=1.0, description="sampling temperature")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(default=1.0, description="nucleus sampling; 1 is off")
    top_k: NonNegativeInt = Field(default=0, description="sample among the k likeliest tokens; 0 is off")
    stop_token_ids: tuple[NonNegativeInt, ...] = Field(
        default=(),
        description="ids that end a response; when empty, those of the model's generation_config.json, config.json and "
        "tokenizer together",
    )
    batch_size: Count = Field(default=64, description="sequences generated at once by one process")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="dtype of the engine; the model's by default"
    )
    bucket_mb: Mebibytes = Field(default=256.0, description="weight sync: bytes handed over at once, in MiB")
    save_every: NonNegativeInt = Field(default=1, description="write the rollouts of every n-th step; 0 is never")


class EvalSettings(Settings):
    """Accuracy on the held-out sources."""

    every: NonNegativeInt = Field(default=0, description="steps between evaluations; 0 is only when asked for")
    at_start: bool = Field(default=False, description="evaluate before the first step")
    at_end: bool = Field(default=False, description="evaluate after the last step")
    patience: NonNegativeInt = Field(
        default=0,
        description="stop after so many evaluations in a row without a lower loss on data.validation; 0 is never",
    )
    samples: Count = Field(default=1, description="responses per problem; 1 with temperature 0 is greedy")
    temperature: NonNegativeFloat = Field(default=0.0, description="0 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(default=1.0, description="nucleus sampling; 1 is off")
    max_response_tokens: PositiveInt | None = Field(
        default=None, description="longest response; the rollout's by default"
    )
    thinking: Thinking | None = Field(default=None, description="as prompt.thinking; null: the student's in training")


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
    if not method.samples_responses:
        names = ["ahead", "agreement_every", "save_every"]
        if config.sdrrl.dir is None:  # whose build samples own responses by them
            names += ["temperature", "top_p", "top_k"]
        rule = f"with objective.name = {method.name}, which samples no responses (section eval says how it evaluates)"
        found += without_effect("rollout", rollout, names, rule)
    if not rollout.agreement_every:
        names, remedy = ["agreement_limit", "agreement_failure"], "Remove it, or set agreement_every."
        found += without_effect("rollout", rollout, names, "with rollout.agreement_every = 0", remedy)
    found += [*_policy_problems(config), *_eval_problems(config)]
    return found


def idle(config: Config) -> list[Problem]:
    """Return what has no effect and is said, not refused: the settings of other commands, or of the other engine."""
    found: list[Problem] = []
    if config.trains_with_servers:
        rule = "with rollout.engine = sglang (sglang.concurrency is the servers')"
        found += without_effect("rollout", config.rollout, ["batch_size"], rule)
    steps = config.run.steps
    periods = {("eval", "every"): config.eval, ("rollout", "agreement_every"): config.rollout}
    if config.method.samples_responses:
        periods["rollout", "save_every"] = config.rollout
    for (section, name), settings in periods.items():
        if getattr(settings, name) > steps:
            rule = f"as the run ends before, after run.steps = {steps}"
            found += without_effect(section, settings, [name], rule, "Lower it, or set 0.")
    if not config.evaluates:
        rule = "in training: with eval.every, at_start and at_end off, only copsd evaluate goes by it"
        for name, sources in (("eval", config.data.eval), ("validation", config.data.validation)):
            if sources:
                labels = ", ".join(source.label for source in sources)
                remedy = "Set eval.at_end, or leave it."
                found.append(Problem(f"data.{name}", labels, f"has no effect {rule}", remedy))
        names = [n for n in EvalSettings.model_fields if n not in ("every", "at_start", "at_end", "patience")]
        found += without_effect("eval", config.eval, names, rule, "Set eval.at_end, or leave it.")
    return found


def _policy_problems(config: Config) -> list[Problem]:
    """What makes samples of another policy than the one that a method changes."""
    if not config.method.on_policy:
        return []
    rollout = config.rollout
    default = RolloutSettings.model_fields
    found = []
    if rollout.ahead and config.policy.ratio == "one":
        rule = "policy.ratio = one takes the trained policy to be the one that sampled, and this has it sample earlier"
        found.append(Problem("rollout.ahead", rollout.ahead, rule, "Set 0, or policy.ratio: sampled."))
    for name, cuts in {"top_p": rollout.top_p < 1, "top_k": rollout.top_k > 0}.items():
        if cuts:
            rule = f"{config.method.name} changes the whole distribution, and this samples from a part of it"
            found.append(Problem(f"rollout.{name}", getattr(rollout, name), rule, f"Set {default[name].default}."))
    return found


def _eval_problems(config: Config) -> list[Problem]:
    found: list[Problem] = []
    if config.evaluates and not (config.data.eval or config.data.validation):
        found.append(Problem("data.eval", [], "evaluation is asked for and there is no held-out source", "Add one."))
    patience = config.eval.patience
    if patience and not config.eval.every:
        found.append(Problem("eval.patience", patience, "has no effect with eval.every = 0", "Set eval.every."))
    if patience and not config.data.validation:
        rule = "there is no held-out loss to wait for"
        found.append(Problem("eval.patience", patience, rule, "Add data.validation, or remove it."))
    if config.eval.samples > 1 and config.eval.temperature == 0:
        rule = f"with temperature 0 all eval.samples = {config.eval.samples} responses are the same"
        found.append(Problem("eval.temperature", 0, rule, "Raise it, or set samples: 1."))
    if config.eval.temperature == 0:
        rule, remedy = "with eval.temperature = 0, which is greedy", "Remove it, or raise eval.temperature."
        found += without_effect("eval", config.eval, ["top_p"], rule, remedy)
    return found
