"""A model's config.json as an ``Architecture``, under every spelling that transformers has had; plain JSON, no torch.

What each key means to a family is data, in ``hf/families``. A feature that the trainer lacks is an error here, before
any process group exists, because a model built without it would train but be another model.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_copsd.architecture import Architecture, LinearScaling, Llama3Scaling, Rope
from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.families.keys import HEADS, HIDDEN_OVER_HEADS, Derived, Family, Only, TokenId, Used
from megatron_copsd.hf.families.llama import LLAMA
from megatron_copsd.hf.families.qwen2 import QWEN2
from megatron_copsd.hf.families.qwen3 import QWEN3
from megatron_copsd.hf.families.qwen3_moe import QWEN3_MOE
from megatron_copsd.hf.files import is_folder, model_file, read_object, refuse_foreign

FAMILIES: Mapping[str, Family] = {family.name: family for family in (LLAMA, QWEN2, QWEN3, QWEN3_MOE)}

_DERIVED = (HEADS, HIDDEN_OVER_HEADS)
_CHECK_FILE = "Compare the file with the one that the model was published with."
# Far above any model, and small enough to count with: what is larger is a slip, and would fill the memory.
_LARGEST_SIZE, _LARGEST_NUMBER = 2**24, 1e30
_LARGEST = {"layers": 10_000, "experts": 10_000, "max_positions": 2**31 - 1}
_OF_ALL_ROPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_SCALINGS: Mapping[str, tuple[str, ...]] = {"default": (), "linear": ("factor",), "llama3": _LLAMA3}


@dataclass(frozen=True)
class _File:
    """The content of a config.json, and where it comes from in errors."""

    content: Mapping[str, object]
    where: str

    def refuse(self, name: str, value: object, rule: str, remedy: str) -> UserError:
        return UserError(describe(f"{self.where} config.json: {name}", value, rule, remedy))


def read_architecture(path: str, revision: str | None = None) -> Architecture:
    """Read the architecture of a HF folder or hub model.

    Args:
        path: a folder, or a hub name, whose config.json is then fetched.
        revision: of the hub model: branch, tag or commit.

    Raises:
        UserError: the folder or its config.json is missing or malformed, or the model has an unsupported feature.
    """
    where = f"model.path ({path})"
    if is_folder(path):
        refuse_foreign(Path(path))
    file = model_file(path, "config.json", revision)
    if file is None:
        raise UserError(describe(where, path, "the model has no config.json", "Give a HF model folder."))
    return architecture_from(read_object(file, where), where)


def architecture_from(content: Mapping[str, object], where: str) -> Architecture:
    """Translate the content of a config.json; ``where`` names its origin in errors.

    Raises:
        UserError: a value is not one of its kind, or the model has an unsupported feature.
    """
    file = _File(content, where)
    name = content.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        remedy = f"Give a model of one of {', '.join(FAMILIES)}."
        raise file.refuse("model_type", name, "this family has no weight table", remedy)
    _refuse_unknown(file, family)
    for key, use in family.keys.items():
        if isinstance(use, Only):
            _check_only(file, key, use)
    sizes = _sizes(file, family)
    for key, use in family.keys.items():
        if isinstance(use, TokenId):
            _check_token(file, key, use, sizes["vocab_size"])
    _check_layer_types(file, sizes["layers"])
    architecture = Architecture(
        family=family.name,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope=_rope(file, family.rope_theta, sizes["max_positions"]),
        **sizes,
    )
    if architecture.experts_per_token == 1 and architecture.norm_topk_prob:
        rule = "with norm_topk_prob the one expert's weight is always 1 and the router has no gradient"
        raise file.refuse("num_experts_per_tok", 1, rule, "Give a model whose tokens go to several experts.")
    return architecture


def _refuse_unknown(file: _File, family: Family) -> None:
    known = set(family.keys) | {name for use in family.keys.values() if isinstance(use, Used) for name in use.spellings}
    unknown = sorted(file.content.keys() - known)
    if unknown:
        name = unknown[0]
        others = f" (nor are {', '.join(unknown[1:])})" if unknown[1:] else ""
        rule = f"no key that {family.name} is known to have{others}; it may make another model"
        close = difflib.get_close_matches(name, known, 1)
        remedy = "Remove it if the model does not depend on it."
        raise file.refuse(name, file.content[name], rule, f"Did you mean {close[0]!r}? {remedy}" if close else remedy)


def _check_token(file: _File, key: str, use: TokenId, vocab_size: int) -> None:
    value = file.content.get(key)
    for token in value if use.several and isinstance(value, list) else [value]:
        if token is not None and (type(token) is not int or not use.lowest <= token < vocab_size):
            rule = f"must be a token id from {use.lowest} to {vocab_size - 1}{' or a list of them' * use.several}"
            raise file.refuse(key, value, rule, _CHECK_FILE)


def _check_layer_types(file: _File, layers: int) -> None:
    kinds = file.content.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != layers):
        raise file.refuse("layer_types", kinds, f"must list a kind for each of {layers} layers", _CHECK_FILE)


def _check_only(file: _File, key: str, use: Only) -> None:
    if key not in file.content:
        return
    value = file.content[key]
    if not use.each and not _among(value, use.allowed):
        raise file.refuse(key, value, use.rule, use.remedy or f"Give a model whose {key} is {use.allowed[0]!r}.")
    if use.each and value is not None:
        items = value if isinstance(value, list) else [value]
        if not all(_among(item, use.allowed) for item in items):
            raise file.refuse(key, value, use.rule, use.remedy or "Give a model whose layers are all of that kind.")


def _among(value: object, allowed: tuple[object, ...]) -> bool:
    """Whether a value is one of those allowed, ``true`` not being 1."""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed)


def _sizes(file: _File, family: Family) -> dict[str, Any]:
    """Fields of ``Architecture`` and their values."""
    found: dict[str, Any] = {}
    derived: dict[str, Derived] = {}
    for key, use in family.keys.items():
        if isinstance(use, Used):
            value = _value(file, key, use)
            if value in _DERIVED:
                derived[use.field] = value
            else:
                found[use.field] = value
    heads, hidden = found["heads"], found["hidden"]
    if hidden % heads and (family.whole_heads or HIDDEN_OVER_HEADS in derived.values()):
        raise file.refuse("hidden_size", hidden, f"must be a multiple of num_attention_heads = {heads}", _CHECK_FILE)
    found |= {field: heads if way == HEADS else hidden // heads for field, way in derived.items()}
    groups, experts = found["kv_groups"], found.get("experts")
    if heads % groups:
        raise file.refuse("num_key_value_heads", groups, f"must divide num_attention_heads = {heads}", _CHECK_FILE)
    if experts and found["experts_per_token"] > experts:
        rule = f"must not exceed the model's {experts} experts"
        raise file.refuse("num_experts_per_tok", found["experts_per_token"], rule, _CHECK_FILE)
    if found["norm_eps"] >= 1:
        raise file.refuse("rms_norm_eps", found["norm_eps"], "must be a number far below 1", _CHECK_FILE)
    if found["head_dim"] % 2:
        raise file.refuse("head_dim", found["head_dim"], "rotary positions turn pairs of columns", _CHECK_FILE)
    return found


def _value(file: _File, key: str, use: Used) -> Any:
    """Return a key's value, or how it is derived from others."""
    written = {name: file.content[name] for name in (key, *use.spellings) if name in file.content}
    if not written:
        return use.absent
    name, value = written.popitem()
    for other in written.values():
        if other != value:
            raise file.refuse(name, value, f"says something else than {key} = {other!r}", "Remove one of the two.")
    if value is None and use.null is not None:
        return use.null
    if isinstance(use.absent, bool):
        if not isinstance(value, bool):
            raise file.refuse(name, value, "must be true or false", _CHECK_FILE)
        return value
    if isinstance(use.absent, float):
        return _number(file, name, value)
    return _whole(file, name, value, _LARGEST.get(use.field, _LARGEST_SIZE))


def _whole(file: _File, name: str, value: object, largest: int) -> int:
    if type(value) is not int or value < 1:
        raise file.refuse(name, value, "must be a whole number above 0", _CHECK_FILE)
    if value > largest:
        raise file.refuse(name, value, f"must be at most {largest}; no model is of such a size", _CHECK_FILE)
    return value


def _number(file: _File, name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < _LARGEST_NUMBER:
        raise file.refuse(name, value, "must be a number above 0", _CHECK_FILE)
    return float(value)


def _rope(file: _File, theta: float, max_positions: int) -> Rope:
    """Read ``rope_parameters``, as transformers 5 writes, or ``rope_theta`` and ``rope_scaling``, as those before."""
    content = file.content
    name, said = _said_of_rope(file)
    for share in (said.get("partial_rotary_factor"), content.get("partial_rotary_factor")):
        if share is not None and (type(share) not in (int, float) or share != 1):
            rule = "rotary positions of a part of each head are not supported"
            raise file.refuse("partial_rotary_factor", share, rule, "Give a model that turns whole heads.")
    bases = [of["rope_theta"] for of in (said, content) if "rope_theta" in of]
    base = _number(file, "rope_theta", bases[0] if bases else theta)
    if len(bases) > 1 and bases[0] != bases[1]:
        rule = f"says something else than rope_theta = {bases[0]!r} of {name}"
        raise file.refuse("rope_theta", bases[1], rule, "Remove one of the two.")
    kinds = [said[key] for key in ("rope_type", "type") if key in said]
    kind = kinds[0] if kinds else "default"
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise file.refuse("rope_type", kind, "this rotary scaling is not supported", "Use default, linear or llama3.")
    if kinds[1:] and kinds[1] != kind:
        raise file.refuse("type", kinds[1], f"says something else than rope_type = {kind!r}", "Remove one of the two.")
    for key in said:
        if key not in (*_OF_ALL_ROPE, *_SCALINGS[kind]):
            rule = f"means nothing for rotary positions of rope_type = {kind!r}"
            raise file.refuse(f"{name}.{key}", said[key], rule, "Remove it, or correct rope_type.")
    if kind == "default":
        return Rope(base)
    factor = _number(file, "rope factor", said.get("factor"))
    if kind == "linear":
        return Rope(base, LinearScaling(factor))
    # As transformers, which lets what stands outside win; without either the model was never extended.
    original = said.get("original_max_position_embeddings", max_positions)
    original = content.get("original_max_position_embeddings", original)
    low, high = (_number(file, f"rope {key}", said.get(key)) for key in ("low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise file.refuse("rope low_freq_factor", low, f"must be below high_freq_factor = {high}", _CHECK_FILE)
    whole = _whole(file, "original_max_position_embeddings", original, _LARGEST["max_positions"])
    return Rope(base, Llama3Scaling(factor, low, high, whole))


def _said_of_rope(file: _File) -> tuple[str, Mapping[str, Any]]:
    """Return the object that says how positions turn, and its name."""
    said: dict[str, dict[str, Any]] = {}
    for name in ("rope_parameters", "rope_scaling"):
        value = file.content.get(name)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise file.refuse(name, value, "must be an object", _CHECK_FILE)
        if any(isinstance(item, dict) for item in value.values()):
            rule = "rotary positions must be the same for all layers"
            raise file.refuse(name, value, rule, "Give a model with one set of rotary positions.")
        if value:
            said[name] = value
    if len(said) > 1 and said["rope_scaling"] != said["rope_parameters"]:
        rule = f"says something else than rope_parameters = {said['rope_parameters']!r}"
        raise file.refuse("rope_scaling", said["rope_scaling"], rule, "Remove one of the two.")
    return next(iter(said.items()), ("rope_parameters", {}))
