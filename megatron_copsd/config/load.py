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

from megatron_copsd.config.schema import Config
from megatron_copsd.errors import UserError, describe

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Places:
    """Where each setting was written, so that a complaint about it can say so.

    Attributes:
        file: the YAML file.
        lines: line (from 1) of each key of the file.
        overrides: overrides as typed, by the setting they set.
    """

    file: Path
    lines: Mapping[KeyPath, int]
    overrides: Mapping[KeyPath, str]

    def of(self, key: KeyPath) -> str:
        """Return the place of a setting, or of the nearest section around it when it was left to its default."""
        for depth in range(len(key), -1, -1):
            if key[:depth] in self.overrides:
                return f"command line ({self.overrides[key[:depth]]})"
            if key[:depth] in self.lines:
                return f"{self.file}:{self.lines[key[:depth]]}"
        return str(self.file)


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
    text = _read(path)
    lines = _key_lines(path, text)
    tree = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
    if not OmegaConf.is_dict(tree):
        raise UserError(
            describe(f"{path}:1", text.splitlines()[0], "a configuration is a mapping of sections", "See configs/.")
        )
    typed: dict[KeyPath, str] = {}
    for override in overrides:
        key, value = _parse_override(override)
        typed[key] = override
        try:
            OmegaConf.update(tree, ".".join(map(str, key)), value, merge=True)
        except (OmegaConfBaseException, AttributeError, TypeError, ValueError) as error:
            raise UserError(describe("command line", override, str(error).splitlines()[0], "Check the key.")) from error
    places = Places(path, lines, typed)
    try:
        values = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}. Check the ${{...}} references.") from error
    try:
        config = Config.model_validate(_tuples(values), strict=True)
    except ValidationError as error:
        problems = [_explain(item, places) for item in error.errors()]
        raise UserError("\n".join(problems)) from error
    return LoadedConfig(config, places)


def dump_config(config: Config) -> str:
    """Return the whole configuration, defaults included, as YAML that ``load_config`` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(describe("CONFIG", str(path), "no such file", "Give a YAML file, see configs/.")) from None
    except IsADirectoryError:
        raise UserError(describe("CONFIG", str(path), "is a folder", "Give a YAML file, see configs/.")) from None
    except UnicodeDecodeError as error:
        raise UserError(
            describe("CONFIG", str(path), f"not UTF-8 at byte {error.start}", "Save it as UTF-8.")
        ) from None


def _key_lines(path: Path, text: str) -> dict[KeyPath, int]:
    """Map every key of a YAML text to its line; a key given twice is an error, since YAML would keep the last."""
    lines: dict[KeyPath, int] = {}

    def walk(node: yaml.Node, key: KeyPath) -> None:
        if isinstance(node, yaml.MappingNode):
            for name_node, value_node in node.value:
                child = (*key, name_node.value)
                line = name_node.start_mark.line + 1
                if child in lines:
                    rule = f"the key stands at line {lines[child]} already"
                    raise UserError(describe(f"{path}:{line}", ".".join(map(str, child)), rule, "Keep one of the two."))
                lines[child] = line
                walk(value_node, child)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                lines[(*key, index)] = item.start_mark.line + 1
                walk(item, (*key, index))

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        content = text.splitlines()[line - 1] if line <= len(text.splitlines()) else ""
        rule = f"not YAML: {error.problem or error.context}"
        raise UserError(describe(f"{path}:{line}", content, rule, "Check indentation and quotes.")) from None
    if root is not None:
        walk(root, ())
    return lines


def _parse_override(override: str) -> tuple[KeyPath, Any]:
    name, equals, value = override.partition("=")
    if not equals or not name or any(not part for part in name.split(".")):
        raise UserError(
            describe("command line", override, "an override is section.key=value", "For example: optimizer.lr=1e-5")
        )
    if re.search(r"\s#", value) and value.lstrip()[:1] not in ("'", '"'):
        rule = "YAML takes what follows a # for a comment and would drop it"
        raise UserError(describe("command line", override, rule, "Put the value in quotes of its own."))
    key = tuple(int(part) if part.isdigit() else part for part in name.split("."))
    try:
        return key, OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(describe("command line", override, str(error).splitlines()[0], "Quote the value.")) from error


def _tuples(value: Any) -> Any:
    """Turn lists into tuples, which is what frozen settings hold and strict validation asks for."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value


def _explain(item: Mapping[str, Any], places: Places) -> str:
    key: KeyPath = tuple(item["loc"])
    name = ".".join(map(str, key))
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
