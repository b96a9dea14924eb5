"""Sizes of a model, and the parameters that one pipeline stage and tensor rank holds of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_copsd.errors import UserError, describe


@dataclass(frozen=True)
class ModelSizes:
    """What the planner needs of a ``config.json``.

    Attributes:
        layers, hidden, ffn, heads, kv_groups, head_dim, vocab_size: sizes; ``ffn`` is unused with experts.
        tied: whether the output weight is the embedding.
        qkv_bias: whether query, key and value projections have a bias.
        qk_norm: whether queries and keys are normalised per head.
        experts, experts_per_token, expert_ffn: of a mixture of experts; 0 for a dense model.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_groups: int
    head_dim: int
    vocab_size: int
    tied: bool
    qkv_bias: bool = False
    qk_norm: bool = True
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0

    @property
    def query_width(self) -> int:
        """Columns of the queries, and of the attention's output."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of the keys; the values have as many."""
        return self.kv_groups * self.head_dim

    @cached_property
    def parameters(self) -> int:
        """Parameters of the whole model, the vocabulary without padding, a tied embedding once."""
        copies = 1 if self.tied else 2
        layer = sum(parameter.elements for parameter in _layer(self, 1, 1, 1))
        return self.layers * layer + self.hidden + copies * self.vocab_size * self.hidden

    @property
    def active_parameters(self) -> int:
        """Parameters that multiply a token: of the experts, those it is sent to."""
        idle = self.experts - self.experts_per_token
        return self.parameters - self.layers * idle * 3 * self.hidden * self.expert_ffn

    def padded_vocab(self, tensor: int) -> int:
        """Rows of the embedding with every shard a multiple of 64 rows, as the trainer pads it."""
        return -(-self.vocab_size // (64 * tensor)) * 64 * tensor


@dataclass(frozen=True)
class Parameter:
    """One tensor of a rank.

    Attributes:
        elements: of this rank's shard.
        expert: reduced over the replicas of the experts, not over all data-parallel ranks.
        own_bucket: a tied embedding that first and last stage both hold, which Megatron keeps in a bucket of its own.
    """

    elements: int
    expert: bool = False
    own_bucket: bool = False


@dataclass(frozen=True)
class StagePart:
    """Which part of the model one rank of a pipeline stage holds.

    Attributes:
        layers: transformer layers of the stage, over all its virtual stages.
        first, last: whether it holds the embedding, and the final norm and output weight.
        pipeline, tensor, expert, expert_tensor: parallel sizes.
    """

    layers: int
    first: bool
    last: bool
    pipeline: int
    tensor: int
    expert: int = 1
    expert_tensor: int = 1


def stage_parameters(sizes: ModelSizes, part: StagePart) -> tuple[Parameter, ...]:
    """Return the parameters of one rank in the order in which Megatron registers them."""
    vocabulary = sizes.padded_vocab(part.tensor) // part.tensor * sizes.hidden
    twice = sizes.tied and part.pipeline > 1
    found: list[Parameter] = []
    if part.first:
        found.append(Parameter(vocabulary, own_bucket=twice))
    for _ in range(part.layers):
        found += _layer(sizes, part.tensor, part.expert, part.expert_tensor)
    if part.last:
        found.append(Parameter(sizes.hidden))
        if not sizes.tied or part.pipeline > 1:
            found.append(Parameter(vocabulary, own_bucket=twice))
    return tuple(found)


def _layer(sizes: ModelSizes, tensor: int, expert: int, expert_tensor: int) -> list[Parameter]:
    hidden, query = sizes.hidden, sizes.query_width // tensor
    qkv = (sizes.query_width + 2 * sizes.kv_width) // tensor
    layer = [Parameter(hidden), Parameter(hidden * query), Parameter(hidden * qkv)]
    layer += [Parameter(qkv)] if sizes.qkv_bias else []
    layer += [Parameter(sizes.head_dim)] * 2 if sizes.qk_norm else []
    layer.append(Parameter(hidden))
    if not sizes.experts:
        width = sizes.ffn // tensor
        return [*layer, Parameter(2 * width * hidden), Parameter(width * hidden)]
    width, own = sizes.expert_ffn // expert_tensor, sizes.experts // expert
    layer.append(Parameter(sizes.experts * hidden))  # the router, on every rank
    layer += [Parameter(2 * width * hidden, expert=True)] * own
    return [*layer, *[Parameter(width * hidden, expert=True)] * own]


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters that are trained in place of the model.

    Attributes:
        rank: of the matrices A [rank, in] and B [out, rank] of each projection.
        targets: adapted projections, as Hugging Face names them.
    """

    rank: int
    targets: tuple[str, ...] = PROJECTIONS


def adapter_parameters(sizes: ModelSizes, part: StagePart, adapters: Adapters) -> tuple[Parameter, ...]:
    """Return the adapters of one rank: of A and B the one on the cut side of its layer is cut, the other is whole.

    Experts get none.
    """
    hidden, tensor, rank = sizes.hidden, part.tensor, adapters.rank
    outputs = {"q_proj": sizes.query_width, "k_proj": sizes.kv_width, "v_proj": sizes.kv_width}
    layer: list[Parameter] = []
    for target in adapters.targets:
        if target in outputs:
            layer += [Parameter(rank * hidden), Parameter(outputs[target] // tensor * rank)]
        elif target == "o_proj":
            layer += [Parameter(rank * sizes.query_width // tensor), Parameter(hidden * rank)]
        elif not sizes.experts:
            layer += [Parameter(rank * hidden), Parameter(sizes.ffn // tensor * rank)]
    return tuple(layer) * part.layers


def _qwen3(layers: int, hidden: int, ffn: int, heads: int, tied: bool) -> ModelSizes:
    return ModelSizes(layers, hidden, ffn, heads, kv_groups=8, head_dim=128, vocab_size=151936, tied=tied)


def _qwen3_moe(layers: int, hidden: int, heads: int, kv_groups: int, expert_ffn: int) -> ModelSizes:
    return ModelSizes(
        layers, hidden, 0, heads, kv_groups, head_dim=128, vocab_size=151936, tied=False,
        experts=128, experts_per_token=8, expert_ffn=expert_ffn,
    )  # fmt: skip


# From the config.json that each model was published with.
PUBLISHED: Mapping[str, ModelSizes] = {
    "Qwen/Qwen3-0.6B": _qwen3(28, 1024, 3072, 16, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(28, 2048, 6144, 16, tied=True),
    "Qwen/Qwen3-4B": _qwen3(36, 2560, 9728, 32, tied=True),
    "Qwen/Qwen3-8B": _qwen3(36, 4096, 12288, 32, tied=False),
    "Qwen/Qwen3-14B": _qwen3(40, 5120, 17408, 40, tied=False),
    "Qwen/Qwen3-32B": _qwen3(64, 5120, 25600, 64, tied=False),
    "Qwen/Qwen3-30B-A3B": _qwen3_moe(48, 2048, 32, 4, expert_ffn=768),
    "Qwen/Qwen3-235B-A22B": _qwen3_moe(94, 4096, 64, 4, expert_ffn=1536),
}


def read_sizes(path: str) -> ModelSizes:
    """Return the sizes of a published model by its hub name, or of a Hugging Face folder.

    Raises:
        UserError: neither, or its config.json lacks a size.
    """
    if path in PUBLISHED:
        return PUBLISHED[path]
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        rule = "is neither a folder with a config.json nor a model whose sizes are known here"
        remedy = f"Give a folder, or one of {', '.join(PUBLISHED)}."
        raise UserError(describe("model.path", path, rule, remedy)) from None
    except (OSError, ValueError) as error:
        raise UserError(describe(str(file), path, f"can't be read ({error})", "Give a HF model folder.")) from error
    try:
        return sizes_from_hf(config)
    except (KeyError, TypeError) as error:
        raise UserError(describe(str(file), str(error), "this size is missing", "Give a HF model folder.")) from error


def sizes_from_hf(config: Mapping[str, Any]) -> ModelSizes:
    """Translate the content of a ``config.json``.

    Raises:
        KeyError: a size is missing.
    """
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    family = config["model_type"]
    return ModelSizes(
        layers=config["num_hidden_layers"],
        hidden=hidden,
        ffn=config["intermediate_size"],
        heads=heads,
        kv_groups=config.get("num_key_value_heads", heads),
        head_dim=config.get("head_dim") or hidden // heads,
        vocab_size=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family.startswith("qwen3"),
        experts=config.get("num_experts", 0),
        experts_per_token=config.get("num_experts_per_tok", 0),
        expert_ffn=config.get("moe_intermediate_size", 0),
    )
