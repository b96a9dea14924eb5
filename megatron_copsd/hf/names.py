"""Which Megatron parameter holds which HF tensors, and how it is cut: one table for all supported families.

The table is data. A new family is a new set of rows; a new way of cutting is one more ``Cut`` in ``cuts.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from megatron_copsd.hf.architecture import Architecture

Cut = Literal["replicated", "vocab", "qkv", "gated", "row"]


@dataclass(frozen=True)
class Rule:
    """One kind of parameter.

    Attributes:
        megatron: parameter name; ``{i}`` stands for the layer's global number.
        hf: names of the HF tensors it is made of, in the order in which they are merged.
        cut: how the merged tensor is split over tensor-parallel ranks.
    """

    megatron: str
    hf: tuple[str, ...]
    cut: Cut


_OUTSIDE_LAYERS = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab"),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"),
)
_UNTIED = Rule("output_layer.weight", ("lm_head.weight",), "vocab")
# With tied embeddings the last pipeline stage keeps its own copy of the embedding under this name.
_TIED_COPY = Rule("output_layer.weight", ("model.embed_tokens.weight",), "vocab")

_M = "decoder.layers.{i}."
_H = "model.layers.{i}."
_QKV = tuple(_H + f"self_attn.{x}_proj" for x in "qkv")
_LAYER = (
    Rule(_M + "self_attention.linear_qkv.weight", tuple(n + ".weight" for n in _QKV), "qkv"),
    Rule(_M + "self_attention.linear_proj.weight", (_H + "self_attn.o_proj.weight",), "row"),
    Rule(_M + "mlp.linear_fc1.weight", (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"), "gated"),
    Rule(_M + "mlp.linear_fc2.weight", (_H + "mlp.down_proj.weight",), "row"),
)
_QKV_BIAS = Rule(_M + "self_attention.linear_qkv.bias", tuple(n + ".bias" for n in _QKV), "qkv")
_QK_NORMS = (
    Rule(_M + "self_attention.q_layernorm.weight", (_H + "self_attn.q_norm.weight",), "replicated"),
    Rule(_M + "self_attention.k_layernorm.weight", (_H + "self_attn.k_norm.weight",), "replicated"),
)
# The two norms of a layer are modules of their own in the torch implementation and are fused into the linear layer
# that follows in Transformer Engine's; a parameter name matches one of the two.
_NORMS = (
    (_H + "input_layernorm.weight", ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")),
    (_H + "post_attention_layernorm.weight", ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")),
)


class NameTable:
    """The rules that apply to one architecture, looked up by Megatron parameter name."""

    def __init__(self, architecture: Architecture) -> None:
        rules = [*_OUTSIDE_LAYERS, *_LAYER, _TIED_COPY if architecture.tied else _UNTIED]
        rules += [_QKV_BIAS] if architecture.qkv_bias else []
        rules += _QK_NORMS if architecture.qk_norm else []
        rules += [Rule(_M + name, (hf,), "replicated") for hf, names in _NORMS for name in names]
        self._rules = {rule.megatron: rule for rule in rules}

    def rule(self, name: str) -> Rule:
        """Return the rule of a parameter whose layer number is global, with the number filled in.

        Raises:
            KeyError: no rule covers the name: the model was built with a parameter HF does not have.
        """
        layer = re.match(r"decoder\.layers\.(\d+)\.", name)
        if layer is None:
            return self._rules[name]
        number = layer.group(1)
        rule = self._rules[name.replace(f".{number}.", ".{i}.", 1)]
        return Rule(name, tuple(hf.format(i=number) for hf in rule.hf), rule.cut)

    def hf_names(self, layers: int) -> tuple[str, ...]:
        """Names of every HF tensor of the model, in file order, each once."""
        names: dict[str, None] = {}
        for rule in self._rules.values():
            per_layer = range(layers) if "{i}" in rule.megatron else range(1)
            for i in per_layer:
                names.update(dict.fromkeys(hf.format(i=i) for hf in rule.hf))
        return tuple(sorted(names, key=_natural))


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
