"""What a HF ``config.json`` says about a model, in the terms the trainer needs.

Llama-shaped decoders: pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU, in every layer dense or with
routed experts. A feature outside that is an error here, before any process group exists, because a model built without
it would train but be another model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_copsd.config.schema import ParallelSettings
from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.stages import ParallelProblem, stage_problems

Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe"]
FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "qwen3", "qwen3_moe")


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of one decoder.

    Attributes:
        family: which table of weight names applies.
        layers, hidden, ffn, heads, kv_groups, head_dim, vocab_size, max_positions: sizes; ``vocab_size`` is the
            number of rows of the HF embedding, which may exceed the tokenizer's.
        norm_eps: epsilon of every RMSNorm.
        inv_freq: rotary inverse frequencies, [head_dim / 2], any context scaling of the configuration applied.
        tied: whether the output weight is the embedding.
        qkv_bias: whether query, key and value projections have a bias.
        qk_norm: whether queries and keys are normalised per head.
        experts, experts_per_token, moe_ffn: routed experts of every layer, how many a token goes to, and the size of
            each; 0 for a dense model.
        norm_topk_prob: whether the weights of a token's experts are divided by their sum.
    """

    family: Family
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_groups: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    inv_freq: tuple[float, ...]
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    experts: int = 0
    experts_per_token: int = 0
    moe_ffn: int = 0
    norm_topk_prob: bool = False

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Rows of the embedding once padded so that every shard has a multiple of 64 rows."""
        multiple = 64 * tensor_parallel
        return -(-self.vocab_size // multiple) * multiple

    def parallel_problems(self, parallel: ParallelSettings) -> list[ParallelProblem]:
        """Return (setting, value, rule, remedy) for every way this model can't be cut as asked."""
        problems = self._expert_problems(parallel)
        tensor = parallel.tensor
        for what, count in (("attention heads", self.heads), ("key-value groups", self.kv_groups), ("ffn", self.ffn)):
            if count % tensor and not (what == "ffn" and self.experts):  # experts are never cut
                allowed = [n for n in range(1, self.kv_groups + 1) if self._divides(n)]
                remedy = f"Use one of {', '.join(map(str, allowed))}."
                problems.append(("parallel.tensor", tensor, f"must divide the model's {count} {what}", remedy))
        return problems + stage_problems(self.layers, parallel)

    def _expert_problems(self, parallel: ParallelSettings) -> list[ParallelProblem]:
        expert = parallel.expert
        if not self.experts:
            rule = "the model has no experts to spread"
            return [("parallel.expert", expert, rule, "Remove it.")] if expert > 1 else []
        problems: list[ParallelProblem] = []
        if self.experts % expert:
            allowed = ", ".join(str(n) for n in range(1, self.experts + 1) if self.experts % n == 0)
            rule = f"must divide the model's {self.experts} experts"
            problems.append(("parallel.expert", expert, rule, f"Use one of {allowed}."))
        if parallel.tensor > 1 and not parallel.sequence:
            # Without it every tensor-parallel rank would route all tokens, and their experts do the work again.
            rule = "Megatron trains experts under tensor parallelism only with sequence parallelism"
            problems.append(
                ("parallel.tensor", parallel.tensor, rule, "Set parallel.sequence=true, or parallel.tensor=1.")
            )
        return problems

    def _divides(self, tensor: int) -> bool:
        ffn = 0 if self.experts else self.ffn
        return not (self.heads % tensor or self.kv_groups % tensor or ffn % tensor)


def read_architecture(path: str, revision: str | None = None) -> tuple[Architecture, PretrainedConfig]:
    """Read the architecture of a HF folder or hub model.

    Raises:
        UserError: the folder or its config.json is missing or malformed, or the model has an unsupported feature.
    """
    where = f"model.path ({path})"
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise UserError(describe(where, path, "the folder has no config.json", "Give a HF model folder."))
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        rule = f"its configuration could not be read ({str(error).splitlines()[0]})"
        raise UserError(
            describe(where, path, rule, "Give a HF model folder, or a hub name that is reachable.")
        ) from error
    return architecture_from(config, where), config


def architecture_from(config: PretrainedConfig, where: str) -> Architecture:
    """Translate a transformers configuration; ``where`` names its origin in errors."""

    def refuse(name: str, value: Any, rule: str) -> UserError:
        return UserError(describe(f"{where} config.json: {name}", value, rule, f"Supported: {', '.join(FAMILIES)}."))

    if config.model_type not in FAMILIES:
        raise refuse("model_type", config.model_type, "this family has no weight table")
    if config.hidden_act != "silu":
        raise refuse("hidden_act", config.hidden_act, "only silu (SwiGLU) is supported")
    if getattr(config, "mlp_bias", False):
        raise refuse("mlp_bias", True, "biases in the feed-forward layers are not supported")
    if getattr(config, "use_sliding_window", False):
        raise refuse("use_sliding_window", True, "sliding-window attention is not supported")
    bias = config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False))
    if bias and config.model_type != "qwen2":
        # In llama and qwen3 this switch also adds a bias to the output projection.
        raise refuse("attention_bias", True, "a bias on the attention output projection is not supported")
    if getattr(config, "pretraining_tp", 1) != 1:
        raise refuse("pretraining_tp", config.pretraining_tp, "only 1 is supported")
    moe = config.model_type == "qwen3_moe"
    if moe:
        _check_experts(config, refuse)
    return Architecture(
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_groups=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        inv_freq=_inverse_frequencies(config, where),
        tied=bool(config.tie_word_embeddings),
        qkv_bias=bias,
        qk_norm=config.model_type in ("qwen3", "qwen3_moe"),
        experts=config.num_experts if moe else 0,
        experts_per_token=config.num_experts_per_tok if moe else 0,
        moe_ffn=config.moe_intermediate_size if moe else 0,
        norm_topk_prob=moe and bool(config.norm_topk_prob),
    )


def _check_experts(config: PretrainedConfig, refuse: Callable[[str, Any, str], UserError]) -> None:
    if config.decoder_sparse_step != 1:
        raise refuse("decoder_sparse_step", config.decoder_sparse_step, "every layer must have experts (1)")
    if config.mlp_only_layers:
        raise refuse("mlp_only_layers", config.mlp_only_layers, "every layer must have experts ([])")
    if config.num_experts_per_tok == 1 and config.norm_topk_prob:
        rule = "with norm_topk_prob the one expert's weight is always 1 and the router has no gradient"
        raise refuse("num_experts_per_tok", 1, rule)


def _inverse_frequencies(config: PretrainedConfig, where: str) -> tuple[float, ...]:
    """Ask transformers for the frequencies, so that every scaling it implements by frequencies alone is exact."""
    kind = config.rope_parameters.get("rope_type", "default")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return tuple((1.0 / config.rope_parameters["rope_theta"] ** exponents).tolist())
    if kind not in ("linear", "llama3"):
        rule = "this rotary scaling is not supported"
        raise UserError(describe(f"{where} config.json: rope_type", kind, rule, "Use default, linear or llama3."))
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    assert attention_factor == 1.0
    return tuple(inv_freq.tolist())
