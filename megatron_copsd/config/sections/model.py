"""The model, how it is cut over processes, and its adapters."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import Field

from megatron_copsd.config.settings import (
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Problem,
    Processes,
    Seconds,
    Settings,
    without_effect,
)

if TYPE_CHECKING:
    from megatron_copsd.config.schema import Config

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


class ModelSettings(Settings):
    """The model that is both student and teacher."""

    path: PathText = Field(..., description="HF folder, or a hub name such as Qwen/Qwen3-1.7B")
    revision: str | None = Field(default=None, description="hub revision (branch, tag or commit)")
    init: Literal["weights", "random"] = Field(
        default="weights", description="read safetensors, or initialise from run.seed"
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="dtype of parameters and activations")
    implementation: Literal["auto", "torch", "transformer_engine"] = Field(
        default="auto",
        description="layer implementation; auto takes Transformer Engine where it imports and a GPU is present, except "
        "in float32",
    )
    moe_aux_loss: NonNegativeFloat = Field(
        default=0.0,
        description="coefficient of the experts' load-balancing loss. 0: the teacher routes as the model was trained "
        "to, and a pull towards even use would move a student away from it that agrees with it",
    )


class ParallelSettings(Settings):
    """How the model is cut over processes; data parallelism takes what is left of the world size."""

    tensor: Processes = Field(default=1, description="tensor parallel size (TP)")
    pipeline: Processes = Field(default=1, description="pipeline parallel size (PP)")
    context: Processes = Field(default=1, description="context parallel size (CP): ranks that share each sequence")
    expert: Processes = Field(
        default=1,
        description="expert parallel size (EP): each stage's experts are spread over this many of its processes",
    )
    virtual_pipeline: Processes = Field(
        default=1, description="model chunks a pipeline stage (VPP): the interleaved schedule"
    )
    first_stage_layers: PositiveInt | None = Field(
        default=None, description="layers of the first pipeline stage; an even share"
    )
    last_stage_layers: PositiveInt | None = Field(
        default=None, description="layers of the last pipeline stage; an even share"
    )
    sequence: bool = Field(
        default=False, description="cut activations between the tensor-parallel regions by position (SP)"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="activations made again in the backward pass; selective: of feed-forwards, full: of layers",
    )
    recompute_layers: PositiveInt | None = Field(
        default=None, description="recompute full: only the first n layers of each model chunk; all of them if null"
    )
    overlap_grad_reduce: bool = Field(
        default=False, description="reduce gradients over replicas while the backward pass still runs"
    )
    timeout_s: Seconds = Field(default=600.0, description="seconds after which a collective that hangs ends the run")


Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoraSettings(Settings):
    """Low-rank adapters in place of full training; there is no dropout: teacher and student must differ by weights."""

    rank: NonNegativeInt = Field(default=0, description="rank of the adapters; 0 trains the whole model")
    alpha: PositiveFloat | None = Field(
        default=None, description="adapters count alpha / rank times; twice the rank if null"
    )
    targets: tuple[Projection, ...] = Field(
        default=get_args(Projection), min_length=1, description="adapted projections, as Hugging Face names them"
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None,
        description="dtype of the adapters; the model's if null (the optimiser's copy is float32 in any case)",
    )

    @property
    def scale(self) -> float:
        """What the product of an adapter's matrices is multiplied with."""
        return 2.0 if self.alpha is None else self.alpha / max(self.rank, 1)


def problems(config: Config) -> list[Problem]:
    """Return what is wrong with these sections in the light of the others."""
    found = [*parallel_problems(config.parallel), *_lora_problems(config.lora)]
    if os.path.isdir(config.model.path):
        found += without_effect("model", config.model, ["revision"], "where model.path is a folder")
    return found


def expert_problems(config: Config, has_experts: bool) -> list[Problem]:
    """Return every setting that does not suit a model with experts, or one without."""
    found: list[Problem] = []
    if config.model.moe_aux_loss and not has_experts:
        rule = "the model has no experts"
        found.append(Problem("model.moe_aux_loss", config.model.moe_aux_loss, rule, "Remove it."))
    of_experts = [target for target in config.lora.targets if target in _FEED_FORWARD]
    if config.lora.rank and has_experts and of_experts:
        others = [target for target in config.lora.targets if target not in _FEED_FORWARD] or _ATTENTION
        rule = f"the model's {', '.join(of_experts)} belong to experts, which get no adapters"
        found.append(Problem("lora.targets", list(config.lora.targets), rule, f"Set [{', '.join(others)}]."))
    return found


def size_problems(config: Config, vocab_size: int, hidden: int, max_positions: int) -> list[Problem]:
    """Return every setting that is larger than a model of these sizes has use for, and would have memory taken for."""
    found: list[Problem] = []
    top_k, rank = config.loss.teacher_top_k, config.lora.rank
    if top_k is not None and top_k > vocab_size:
        rule, remedy = f"the model's vocabulary has {vocab_size} tokens", "Set null for all of them, or fewer."
        found.append(Problem("loss.teacher_top_k", top_k, rule, remedy))
    if rank > hidden:
        rule = f"no projection of the model has a rank above its hidden size of {hidden}"
        found.append(Problem("lora.rank", rank, rule, "Lower it, or set 0 to train the whole model."))
    for name, value in (
        ("rollout.max_response_tokens", config.rollout.max_response_tokens),
        ("eval.max_response_tokens", config.eval.max_response_tokens),
    ):
        if value is not None and value >= max_positions:
            rule = f"the model takes sequences of {max_positions} tokens, the prompt included"
            found.append(Problem(name, value, rule, "Lower it."))
    for i, token in enumerate(config.rollout.stop_token_ids):
        if token >= vocab_size:
            rule = f"the model's vocabulary has {vocab_size} tokens, from 0"
            found.append(Problem(f"rollout.stop_token_ids.{i}", token, rule, "Name a token of the model."))
    return found


def parallel_problems(parallel: ParallelSettings) -> list[Problem]:
    """Return every setting of the layout that contradicts another, whatever the model."""
    found: list[Problem] = []
    if parallel.sequence and parallel.tensor == 1:
        rule = "cuts the sequence over tensor-parallel ranks, and parallel.tensor = 1"
        found.append(Problem("parallel.sequence", True, rule, "Set false, or raise parallel.tensor."))
    if parallel.recompute != "full":
        rule, remedy = f"with parallel.recompute = {parallel.recompute}", "Remove it, or set recompute: full."
        found += without_effect("parallel", parallel, ["recompute_layers"], rule, remedy)
    if parallel.pipeline == 1:
        for name in ("virtual_pipeline", "first_stage_layers", "last_stage_layers"):
            value = getattr(parallel, name)
            if value != ParallelSettings.model_fields[name].default:
                rule = "cuts up a pipeline, and parallel.pipeline = 1"
                found.append(Problem(f"parallel.{name}", value, rule, "Remove it, or raise parallel.pipeline."))
    return found


def _lora_problems(lora: LoraSettings) -> list[Problem]:
    found: list[Problem] = []
    if lora.rank == 0:
        names = sorted(set(LoraSettings.model_fields) - {"rank"})
        found += without_effect("lora", lora, names, "with lora.rank = 0", "Remove it, or set a rank.")
    for i, target in enumerate(lora.targets):
        if target in lora.targets[:i]:
            found.append(Problem(f"lora.targets.{i}", target, "is named twice", "Name it once."))
    return found
