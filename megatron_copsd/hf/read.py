"""A model's config.json as an ``Architecture``, under every spelling that transformers has had; plain JSON, no torch.

What each key means to a family is data, in ``hf/families``. A feature that the trainer lacks is an error here, before
any process group exists, because a model built without it would train but be another model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_copsd.architecture import Architecture, LinearScaling, Llama3Scaling, Rope
from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.families.keys import HEADS, HIDDEN_OVER_HEADS, Derived, Family, Only, Used
from megatron_copsd.hf.families.llama import LLAMA
from megatron_copsd.hf.families.qwen2 import QWEN2
from megatron_copsd.hf.families.qwen3 import QWEN3
from megatron_copsd.hf.families.qwen3_moe import QWEN3_MOE

FAMILIES: Mapping[str, Family] = {family.name: family for family in (LLAMA, QWEN2, QWEN3, QWEN3_MOE)}

_DERIVED = (HEADS, HIDDEN_OVER_HEADS)
_CHECK_FILE = "Compare the file with the one that the model was published with."


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
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        file = _fetch(path, revision, where)
    elif not file.is_file():
        raise UserError(describe(where, path, "the folder has no config.json", "Give a HF model folder."))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        rule = f"its configuration could not be read ({error})"
        raise UserError(describe(where, str(file), rule, "Download or convert the model again.")) from error
    if not isinstance(content, dict):
        rule = "its configuration could not be read (not a JSON object)"
        raise UserError(describe(where, str(file), rule, "Download or convert the model again."))
    return architecture_from(content, where)


def _fetch(name: str, revision: str | None, where: str) -> Path:
    """Return the config.json of a hub model in the cache, downloaded if it is not there."""
    # Folders need none of this, and it takes a while to import.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (OSError, ValueError, HfHubHTTPError) as error:
        rule = f"its configuration could not be read ({str(error).splitlines()[0]})"
        remedy = "Give a HF model folder, or a hub name that is reachable."
        raise UserError(describe(where, name, rule, remedy)) from error


def architecture_from(content: Mapping[str, object], where: str) -> Architecture:
    """Translate the content of a config.json; ``where`` names its origin in errors.

    Raises:
        UserError: a value is not one of its kind, or the model has an unsupported feature.
    """
    file = _File(content, where)
    name = content.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        remedy = f"Supported: {', '.join(FAMILIES)}."
        raise file.refuse("model_type", name, "this family has no weight table", remedy)
    for key, use in family.keys.items():
        if isinstance(use, Only):
            _check_only(file, key, use)
    sizes = _sizes(file, family)
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


def _check_only(file: _File, key: str, use: Only) -> None:
    if key not in file.content:
        return
    value = file.content[key]
    if not use.each and not _among(value, use.allowed):
        raise file.refuse(key, value, use.rule, f"Give a model whose {key} is {use.allowed[0]!r}.")
    if use.each and value is not None:
        items = value if isinstance(value, list) else [value]
        if not all(_among(item, use.allowed) for item in items):
            raise file.refuse(key, value, use.rule, "Give a model whose layers are all of that kind.")


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
    return _whole(file, name, value)


def _whole(file: _File, name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise file.refuse(name, value, "must be a whole number above 0", _CHECK_FILE)
    return value


def _number(file: _File, name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise file.refuse(name, value, "must be a number above 0", _CHECK_FILE)
    return float(value)


def _rope(file: _File, theta: float, max_positions: int) -> Rope:
    """Read ``rope_parameters``, as transformers 5 writes, or ``rope_theta`` and ``rope_scaling``, as those before."""
    content = file.content
    scaling, parameters = (content.get(name) or {} for name in ("rope_scaling", "rope_parameters"))
    if scaling and parameters and scaling != parameters:
        rule = f"says something else than rope_parameters = {parameters!r}"
        raise file.refuse("rope_scaling", scaling, rule, "Remove one of the two.")
    said = scaling or parameters
    if not isinstance(said, dict) or any(isinstance(value, dict) for value in said.values()):
        rule = "rotary positions must be the same for all layers"
        raise file.refuse("rope_parameters", said, rule, "Give a model with one set of rotary positions.")
    share = said.get("partial_rotary_factor", content.get("partial_rotary_factor"))
    if share not in (None, 1):
        rule = "rotary positions of a part of each head are not supported"
        raise file.refuse("partial_rotary_factor", share, rule, "Give a model that turns whole heads.")
    base = _number(file, "rope_theta", said.get("rope_theta", content.get("rope_theta", theta)))
    kind = said.get("rope_type", said.get("type", "default"))
    if kind == "default":
        return Rope(base)
    if kind not in ("linear", "llama3"):
        rule = "this rotary scaling is not supported"
        raise file.refuse("rope_type", kind, rule, "Use default, linear or llama3.")
    factor = _number(file, "rope factor", said.get("factor"))
    if kind == "linear":
        return Rope(base, LinearScaling(factor))
    # As transformers, which lets what stands outside win; without either the model was never extended.
    original = said.get("original_max_position_embeddings", max_positions)
    return Rope(
        base,
        Llama3Scaling(
            factor,
            _number(file, "rope low_freq_factor", said.get("low_freq_factor")),
            _number(file, "rope high_freq_factor", said.get("high_freq_factor")),
            _whole(
                file,
                "original_max_position_embeddings",
                content.get("original_max_position_embeddings", original),
            ),
        ),
    )
