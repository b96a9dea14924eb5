"""What a key of config.json can be to the trainer, and the keys that mean the same in every family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# How a size that is not written follows from others.
Derived = Literal["num_attention_heads", "hidden_size / num_attention_heads"]
HEADS: Derived = "num_attention_heads"
HIDDEN_OVER_HEADS: Derived = "hidden_size / num_attention_heads"


@dataclass(frozen=True)
class Used:
    """A key whose value the architecture takes.

    Attributes:
        field: of ``Architecture``.
        absent: what transformers' configuration class takes where the key is not written; its type is the key's, and
            a derived size is a whole number.
        null: what an explicit null stands for; None: it is refused, as by transformers.
        spellings: further names of the key, of other versions of transformers.
    """

    field: str
    absent: bool | int | float | Derived
    null: Derived | None = None
    spellings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Only:
    """A key whose other values make another model than the trainer builds.

    Attributes:
        allowed: values that are accepted; an absent key has the first.
        rule: why others are refused.
        each: whether the value is a list (or null), of which each item must be allowed.
    """

    allowed: tuple[object, ...]
    rule: str
    each: bool = False


@dataclass(frozen=True)
class Rotary:
    """A key that says part of the rotary positions; ``hf.read`` reads them together."""


@dataclass(frozen=True)
class Irrelevant:
    """A key that changes nothing of what is trained, and why."""

    why: str


Key = Used | Only | Rotary | Irrelevant


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of config.json.

    Attributes:
        name: the model_type.
        keys: what each key means.
        qkv_bias, qk_norm: of ``Architecture``; no key says them.
        rope_theta: base of the rotary positions where no key says it.
        whole_heads: whether hidden_size must be a multiple of the heads even where head_dim is written.
    """

    name: str
    keys: Mapping[str, Key]
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_theta: float = 10000.0
    whole_heads: bool = False


_STOPS = Irrelevant("stop ids come from rollout.stop_token_ids, generation_config.json and the tokenizer")
_WINDOW = Irrelevant("means something with use_sliding_window alone")
NO_OUTPUT_BIAS = Only((False,), "a bias on the attention output projection is not supported")

SHARED: Mapping[str, Key] = {
    "hidden_act": Only(("silu",), "only silu (SwiGLU) is supported"),
    "mlp_bias": Only((False, None), "biases in the feed-forward layers are not supported"),
    "use_sliding_window": Only((False, None), "sliding-window attention is not supported"),
    "layer_types": Only(("full_attention",), "sliding-window attention is not supported", each=True),
    "pretraining_tp": Only((1,), "only 1 is supported"),
    "rope_parameters": Rotary(),
    "rope_scaling": Rotary(),
    "rope_theta": Rotary(),
    "partial_rotary_factor": Rotary(),
    "original_max_position_embeddings": Rotary(),
    "model_type": Irrelevant("chose this table"),
    "architectures": Irrelevant("names of transformers' classes"),
    "transformers_version": Irrelevant("who wrote the file; every spelling is read"),
    "dtype": Irrelevant("model.dtype says it"),
    "torch_dtype": Irrelevant("model.dtype says it"),
    "initializer_range": Irrelevant("random weights are transformers' own"),
    "attention_dropout": Irrelevant("training drops nothing out: teacher and student must differ by weights alone"),
    "use_cache": Irrelevant("of generation"),
    "bos_token_id": _STOPS,
    "eos_token_id": _STOPS,
    "pad_token_id": Irrelevant("padding is masked, whatever its id"),
    "sliding_window": _WINDOW,
    "max_window_layers": _WINDOW,
}
