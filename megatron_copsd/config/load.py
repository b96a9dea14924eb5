"""Reading a configuration: YAML file plus ``key.path=value`` overrides, every mistake reported with its place."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from megatron_copsd.config.files import (
    EXTENDS,
    KeyPath,
    Place,
    Places,
    dotted,
    key_path,
    read_files,
    reference_error,
)
from megatron_copsd.config.schema import Config
from megatron_copsd.errors import UserError, describe


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration that is valid by itself, and where its settings came from."""

    config: Config
    places: Places


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read one YAML file, apply overrides of the form ``section.key=value``, and validate the result.

    Raises:
        UserError: with all mistakes found, one a line, each with file:line or the override, value, rule and remedy.
    """
    path = Path(path)
    layer = read_files(path)
    tree = OmegaConf.create(layer.values)
    written = dict(layer.written)
    for override in overrides:
        key, value = _parse_override(override)
        try:
            OmegaConf.update(tree, dotted(key), value, merge=True)
        except (OmegaConfBaseException, AttributeError, TypeError, ValueError) as error:
            raise UserError(describe("command line", override, str(error).splitlines()[0], "Check the key.")) from error
        _note(written, key, value, Place("command line", override))
    places = Places(path, written)
    try:
        values = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise reference_error(places, error) from error
    try:
        config = Config.model_validate(_tuples(values), strict=True)
    except ValidationError as error:
        problems = [_explain(item, places) for item in error.errors()]
        raise UserError("\n".join(problems)) from error
    return LoadedConfig(config, places)


def _parse_override(override: str) -> tuple[KeyPath, Any]:
    name, equals, value = override.partition("=")
    if not equals or not name or any(not part for part in name.split(".")):
        raise UserError(
            describe("command line", override, "an override is section.key=value", "For example: optimizer.lr=1e-5")
        )
    if re.search(r"\s#", value) and value.lstrip()[:1] not in ("'", '"'):
        rule = "YAML takes what follows a # for a comment and would drop it"
        raise UserError(describe("command line", override, rule, "Put the value in quotes of its own."))
    if name == EXTENDS:
        rule = "a file says what it extends, an override is one setting"
        raise UserError(describe("command line", override, rule, "Give a file that extends it as CONFIG."))
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(describe("command line", override, str(error).splitlines()[0], "Quote the value.")) from error
    return key_path(name), parsed["value"]


def _note(written: dict[KeyPath, Place], key: KeyPath, value: Any, place: Place) -> None:
    """Note where an override was written: a mapping changes its own keys only, anything else replaces what was."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _note(written, (*key, name), inner, place)
    else:
        for other in [other for other in written if other[: len(key)] == key]:
            del written[other]
    written[key] = place


def _tuples(value: Any) -> Any:
    """Turn lists into tuples, which is what frozen settings hold and strict validation asks for."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value


def _explain(item: Mapping[str, Any], places: Places) -> str:
    key: KeyPath = tuple(item["loc"])
    name = dotted(key)
    if item["type"] == "missing":
        return f"{places.of(key)}: {name}: is required. Add it, see configs/ for examples."
    if item["type"] == "extra_forbidden":
        known = _fields_at(key[:-1])
        close = difflib.get_close_matches(str(key[-1]), known, n=1)
        remedy = f"Did you mean {close[0]!r}?" if close else f"Known here: {', '.join(known)}."
        return f"{places.of(key)}: {name}: unknown setting. {remedy}"
    remedy = "See copsd train --help-settings."
    return describe(f"{places.of(key)}: {name}", item["input"], _lower_first(item["msg"]), remedy)


def _lower_first(message: str) -> str:
    return message[:1].lower() + message[1:]


def _fields_at(key: KeyPath) -> list[str]:
    """Names of the settings of the section that a key path leads to."""
    model: type[BaseModel] = Config
    for part in key:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = (annotation, *get_args(annotation))
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return sorted(model.model_fields)
