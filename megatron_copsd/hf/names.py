"""Which Megatron parameter holds which HF tensors, and how it is cut: one table for all supported families.

The table is data. A new family is a new set of rows; a new way of cutting is one more ``Cut`` in ``cuts.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

from megatron_copsd.architecture import Architecture

Cut = Literal["replicated", "vocab", "qkv", "gated", "row"]


@dataclass(frozen=True)
class Rule:
    """One kind of parameter.

    Attributes:
        megatron: parameter name; ``{i}`` stands for the layer's global number, ``{e}`` for an expert's number, which
            counts from the first expert of the rank.
        hf: names of the HF tensors it is made of, in the order in which they are merged; ``{e}`` is the global number.
        cut: how the merged tensor is split over tensor-parallel ranks.
        expert: whether it belongs to an expert: experts are spread over ranks whole, and never cut.
    """

    megatron: str
    hf: tuple[str, ...]
    cut: Cut
    expert: bool = False


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
)
_DENSE = (
    Rule(_M + "mlp.linear_fc1.weight", (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"), "gated"),
    Rule(_M + "mlp.linear_fc2.weight", (_H + "mlp.down_proj.weight",), "row"),
)
_GATE_UP = tuple(_H + f"mlp.experts.{{e}}.{name}_proj.weight" for name in ("gate", "up"))
_DOWN = (_H + "mlp.experts.{e}.down_proj.weight",)
# A rank's experts are modules of their own in the torch implementation, and one grouped linear layer in Transformer
# Engine's.
_EXPERTS = (
    Rule(_M + "mlp.router.weight", (_H + "mlp.gate.weight",), "replicated"),
    Rule(_M + "mlp.experts.local_experts.{e}.linear_fc1.weight", _GATE_UP, "gated", expert=True),
    Rule(_M + "mlp.experts.local_experts.{e}.linear_fc2.weight", _DOWN, "row", expert=True),
    Rule(_M + "mlp.experts.linear_fc1.weight{e}", _GATE_UP, "gated", expert=True),
    Rule(_M + "mlp.experts.linear_fc2.weight{e}", _DOWN, "row", expert=True),
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


_EXPERT_NUMBER = re.compile(r"(?<=\.experts\.local_experts\.)\d+|(?<=\.linear_fc[12]\.weight)\d+$")


class NameTable:
    """The rules that apply to one architecture, looked up by Megatron parameter name."""

    def __init__(self, architecture: Architecture) -> None:
        rules = [*_OUTSIDE_LAYERS, *_LAYER, _TIED_COPY if architecture.tied else _UNTIED]
        rules += _EXPERTS if architecture.experts else _DENSE
        rules += [_QKV_BIAS] if architecture.qkv_bias else []
        rules += _QK_NORMS if architecture.qk_norm else []
        rules += [Rule(_M + name, (hf,), "replicated") for hf, names in _NORMS for name in names]
        self._rules = {rule.megatron: rule for rule in rules}
        self._experts = architecture.experts

    @property
    def rules(self) -> tuple[Rule, ...]:
        """All of them, their numbers not filled in."""
        return tuple(self._rules.values())

    def rule(self, name: str, first_expert: int = 0) -> Rule:
        """Return the rule of a parameter whose layer number is global, with the numbers filled in.

        Args:
            name: of the parameter.
            first_expert: global number of the first expert of the rank that holds it.

        Raises:
            KeyError: no rule covers the name: the model was built with a parameter HF does not have.
        """
        layer = re.match(r"decoder\.layers\.(\d+)\.", name)
        if layer is None:
            return self._rules[name]
        number = layer.group(1)
        template = name.replace(f".{number}.", ".{i}.", 1)
        expert = _EXPERT_NUMBER.search(template)
        if expert is None:
            rule = self._rules[template]
            return Rule(name, tuple(hf.format(i=number) for hf in rule.hf), rule.cut)
        rule = self._rules[_EXPERT_NUMBER.sub("{e}", template)]
        numbers = {"i": number, "e": first_expert + int(expert.group())}
        return Rule(name, tuple(hf.format(**numbers) for hf in rule.hf), rule.cut, rule.expert)

    def hf_names(self, layers: int) -> tuple[str, ...]:
        """Names of every HF tensor of the model, in file order, each once."""
        names: dict[str, None] = {}
        for rule in self._rules.values():
            per_layer = range(layers) if "{i}" in rule.megatron else range(1)
            for i, e in product(per_layer, range(self._experts) if rule.expert else range(1)):
                names.update(dict.fromkeys(hf.format(i=i, e=e) for hf in rule.hf))
        return tuple(sorted(names, key=_natural))


def hf_shapes(architecture: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every HF tensor of the model, some more than once.

    One by one, so that who looks for the first that is missing need not count to the last of a size that is a slip.
    """
    sizes = _sizes(architecture)
    for rule in NameTable(architecture).rules:
        layers = range(architecture.layers) if "{i}" in rule.megatron else range(1)
        experts = range(architecture.experts) if rule.expert else range(1)
        for i, e, hf in ((i, e, hf) for i in layers for e in experts for hf in rule.hf):
            part, kind = hf.split(".")[-2:]
            rows, columns = sizes[f"experts.{part}" if rule.expert else part]
            yield hf.format(i=i, e=e), (rows,) if columns is None or kind == "bias" else (rows, columns)


def _sizes(model: Architecture) -> dict[str, tuple[int, int | None]]:
    """Rows and columns of each kind of weight; a norm has no columns."""
    hidden = model.hidden
    norms = ("norm", "input_layernorm", "post_attention_layernorm")
    return {
        "embed_tokens": (model.vocab_size, hidden),
        "lm_head": (model.vocab_size, hidden),
        **dict.fromkeys(norms, (hidden, None)),
        **dict.fromkeys(("q_norm", "k_norm"), (model.head_dim, None)),
        "q_proj": (model.query_width, hidden),
        **dict.fromkeys(("k_proj", "v_proj"), (model.kv_width, hidden)),
        "o_proj": (hidden, model.query_width),
        **dict.fromkeys(("gate_proj", "up_proj"), (model.ffn, hidden)),
        "down_proj": (hidden, model.ffn),
        "gate": (model.experts, hidden),
        **dict.fromkeys(("experts.gate_proj", "experts.up_proj"), (model.moe_ffn, hidden)),
        "experts.down_proj": (hidden, model.moe_ffn),
    }


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
