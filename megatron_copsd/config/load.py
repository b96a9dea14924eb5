"""Reading a configuration: YAML file plus ``key.path=value`` overrides, every mistake reported with its place."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from megatron_copsd.config.reading.document import KeyPath, dotted, read_document
from megatron_copsd.config.reading.files import EXTENDS, Place, Places, key_path, merged, read_files
from megatron_copsd.config.schema import Config
from megatron_copsd.errors import UserError, describe

_MOST_DOTS = 20
_SHOWN = 120
_LONGEST = 100_000
_REFERENCE = re.compile(r"\$\{\s*([^${}:\s]+)\s*\}")


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
    values: Any = layer.values
    written = dict(layer.written)
    for override in overrides:
        key, value = _parse_override(override)
        values = _with(values, key, value, (), written, override)
        _note(written, key, value, Place("command line", override))
    places = Places(path, written)
    values = _resolved(values, places)
    try:
        config = Config.model_validate(_tuples(values), strict=True)
    except ValidationError as error:
        problems = [_explain(item, places) for item in error.errors() if not _follows(item)]
        raise UserError("\n".join(problems)) from error
    return LoadedConfig(config, places)


def _parse_override(override: str) -> tuple[KeyPath, Any]:
    name, equals, value = override.partition("=")
    if not equals or not all(name.split(".")) or name.count(".") > _MOST_DOTS:
        raise UserError(
            describe("command line", override, "an override is section.key=value", "For example: optimizer.lr=1e-5")
        )
    if re.search(r"\s#", value) and value.lstrip()[:1] not in ("'", '"'):
        rule = "YAML takes what follows a # for a comment and would drop it"
        raise UserError(describe("command line", override, rule, "Put the value in quotes of its own."))
    if name == EXTENDS:
        rule = "a file says what it extends, an override is one setting"
        raise UserError(describe("command line", override, rule, "Give a file that extends it as CONFIG."))
    if re.search(r"\[\d+\]", name):
        rule = "an item of a list is named by its number between dots"
        raise UserError(describe("command line", override, rule, "For example: data.train.0.path=problems.jsonl"))
    document = read_document(value, lambda line: str(Place("command line", override)))
    return key_path(name), document.value


def _with(tree: Any, key: KeyPath, value: Any, above: KeyPath, written: dict[KeyPath, Place], override: str) -> Any:
    """Return a tree with a value in the place of what was at ``key``, or merged into it where both are mappings.

    Args:
        tree: what the settings are at ``above``.
        key: the rest of the way.
        value: what the override says.
        above: where ``tree`` is.
        written: places; what is replaced is taken out.
        override: as typed, for the error.
    """
    first, rest = key[0], key[1:]
    here = (*above, first)
    if isinstance(tree, dict) and isinstance(first, str):
        low = tree.get(first, {})
    elif isinstance(tree, list) and isinstance(first, int) and first < len(tree):
        low = tree[first]
    else:
        found = repr(tree)
        if isinstance(tree, dict):
            found = "a section, whose settings have names"
        elif isinstance(tree, list):
            found = f"a list of {len(tree)}, whose items are numbered from 0"
        rule = f"{dotted(above) or 'the configuration'} is {found}"
        raise UserError(describe("command line", override, rule, "Check the key."))
    new = _with(low, rest, value, here, written, override) if rest else merged(low, value, here, written)
    if isinstance(tree, dict):
        return {**tree, first: new}
    return [new if place == first else item for place, item in enumerate(tree)]


def _resolved(values: dict[str, Any], places: Places) -> Any:
    """Follow the references (``${...}``).

    Raises:
        UserError: one can't be read or followed, or together they make a text without end.
    """
    lengths: dict[KeyPath, int] = {}
    for key in list(places.written):
        try:
            rule = f"has more than {_LONGEST:,} characters, references followed"
            too_long = _length(values, key, lengths) > _LONGEST
        except RecursionError:
            rule, too_long = "leads from reference to reference without end", True
        if too_long:
            raise UserError(describe(places.named(dotted(key)), _at(values, key), rule, "Write the text out."))
    try:
        return OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except OmegaConfBaseException as error:
        key = key_path((error.full_key or "").replace("[", ".").replace("]", ""))
        value = _at(values, key)
        rule = f"the reference can't be followed ({str(error).splitlines()[0][:_SHOWN]})"
        remedy = r"Correct it, or write \${ for these characters."
        raise UserError(describe(places.named(dotted(key)), value, rule, remedy)) from error


def _at(tree: Any, key: KeyPath) -> Any:
    """What stands at a key; None where nothing does."""
    with suppress(LookupError, TypeError):
        for part in key:
            tree = tree[part]
        return tree
    return None


def _length(tree: Any, key: KeyPath, known: dict[KeyPath, int]) -> int:
    """Return how many characters a value has, references followed, without following them.

    Args:
        tree: all settings.
        key: where the value stands.
        known: of other values; those that are being looked at count nothing: a circle of references is told by others.
    """
    if key not in known:
        known[key] = 0
        value = _at(tree, key)
        if isinstance(value, (dict, list)):
            inner = value if isinstance(value, dict) else range(len(value))
            known[key] = sum(_length(tree, (*key, part), known) for part in inner)
        elif isinstance(value, str):
            targets = (_target(name, key) for name in _REFERENCE.findall(value))
            known[key] = min(len(value) + sum(_length(tree, target, known) for target in targets), _LONGEST + 1)
    return known[key]


def _target(name: str, key: KeyPath) -> KeyPath:
    """Where a reference in the value at ``key`` leads; one that begins with dots starts at sections around it."""
    named = name.lstrip(".")
    dots = len(name) - len(named)
    return (*(key[:-dots] if dots else ()), *key_path(named.replace("[", ".").replace("]", "")))


def _note(written: dict[KeyPath, Place], key: KeyPath, value: Any, place: Place) -> None:
    """Note where an override and all that it says was written."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _note(written, (*key, name), inner, place)
    written[key] = place


def _tuples(value: Any) -> Any:
    """Turn lists into tuples, which is what frozen settings hold and strict validation asks for."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value


_RULES = {
    "model_type": "must be a section: names of settings, each with its value",
    "tuple_type": "must be a list",
    "string_type": "must be a text (in quotes, where it looks like a number)",
    "too_short": "must have at least one item",
}


def _follows(item: Mapping[str, Any]) -> bool:
    """Whether a mistake is only that another one, in an item of a list, leaves the list short."""
    return item["type"] == "too_short" and len(item["input"]) > 0


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
    rule = _RULES.get(item["type"]) or _lower_first(item["msg"].removeprefix("Value error, "))
    return describe(places.named(name), item["input"], rule, remedy)


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
