"""Configuration files: their YAML, the files that they extend, and where each value was written.

``extends: FILE``, or a list of files, at the top of a file takes over what those say: each with all that it extends
itself, a later one over an earlier one, and the file's own settings over all. Mappings merge, key by key; anything
else, a list or a null too, replaces what was there. A name starts at the folder of the file that says it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_copsd.errors import UserError, describe

KeyPath = tuple[str | int, ...]
EXTENDS = "extends"


def key_path(name: str) -> KeyPath:
    """Return a setting's keys; a number is a place in a list: ``data.train.0.path``."""
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))


def dotted(key: KeyPath) -> str:
    """Return the name of a setting, as overrides and messages spell it."""
    return ".".join(map(str, key))


@dataclass(frozen=True)
class Place:
    """Where a value was written.

    Attributes:
        source: ``file:line``, or ``command line``.
        override: the override as typed, where the value is from the command line.
    """

    source: str
    override: str = ""

    def __str__(self) -> str:
        return f"{self.source} ({self.override})" if self.override else self.source


@dataclass(frozen=True)
class Layer:
    """What files, or a part of them, say.

    Attributes:
        values: the settings as YAML has them, references (``${...}``) not yet followed.
        written: place of every key and list item in ``values``, sections included.
    """

    values: dict[Any, Any]
    written: Mapping[KeyPath, Place]

    def under(self, upper: Layer) -> Layer:
        """Return this layer with another one laid over it."""
        written = dict(self.written)
        values = _merge(self.values, upper.values, (), written)
        return Layer(values, {**written, **upper.written})


@dataclass(frozen=True)
class Places:
    """Where each setting was written, so that a complaint about it can say so.

    Attributes:
        file: the file that was asked for.
        written: place of every setting that a file or an override gives.
    """

    file: Path
    written: Mapping[KeyPath, Place]

    def nearest(self, key: KeyPath) -> Place:
        """Return the place of a setting, or of the nearest section around it when it was left to its default."""
        found = (self.written[key[:depth]] for depth in range(len(key), 0, -1) if key[:depth] in self.written)
        return next(found, Place(str(self.file)))

    def of(self, key: KeyPath) -> str:
        """Return ``nearest`` as a complaint begins with it."""
        return str(self.nearest(key))

    def named(self, setting: str) -> str:
        """Return where a setting was written, and its name: what a complaint about it begins with."""
        return f"{self.of(key_path(setting))}: {setting}"


def read_files(path: Path) -> Layer:
    """Read a configuration file and all that it extends.

    Raises:
        UserError: a file is missing, is no YAML mapping, gives a key twice, or extends itself.
    """
    return _read_chain(path, "CONFIG", ())


def _read_chain(path: Path, asked: str, above: tuple[Path, ...]) -> Layer:
    """Read one file and what it extends.

    Args:
        path: the file.
        asked: what named it, for the error.
        above: the files that led here, each extending the next.
    """
    text = _read(path, asked)
    written = {key: Place(f"{path}:{line}") for key, line in _key_lines(path, text).items()}
    places = Places(path, written)
    values = _values(places, text)
    layer = Layer({}, {})
    for key, name in _extended(values, places):
        place = f"{places.of(key)}: {dotted(key)}"
        base, chain = path.parent / name, (*above, path)
        reached = [os.path.realpath(file) for file in chain]
        if os.path.realpath(base) in reached:
            cycle = " -> ".join(map(str, (*chain[reached.index(os.path.realpath(base)) :], base)))
            raise UserError(describe(place, name, f"the files extend each other: {cycle}", "Remove one of the links."))
        layer = layer.under(_read_chain(base, place, chain))
    values.pop(EXTENDS, None)
    return layer.under(Layer(values, {key: place for key, place in written.items() if key[0] != EXTENDS}))


def _extended(values: Mapping[Any, Any], places: Places) -> Iterator[tuple[KeyPath, str]]:
    """Yield the key and the name of each file that a file extends, in order."""
    if EXTENDS not in values:
        return
    value = values[EXTENDS]
    named: list[tuple[KeyPath, Any]] = [((EXTENDS,), value)]
    if isinstance(value, list):
        named = [((EXTENDS, index), name) for index, name in enumerate(value)]
    for key, name in named:
        if not isinstance(name, str) or not name:
            rule = "is the name of a file, or a list of names"
            raise UserError(describe(f"{places.of(key)}: {dotted(key)}", name, rule, "Write extends: base.yaml."))
        yield key, name


def _merge(low: Any, high: Any, key: KeyPath, written: dict[KeyPath, Place]) -> Any:
    """Return ``high`` over ``low``, and take what it replaces out of ``written``."""
    if isinstance(low, dict) and isinstance(high, dict):
        return {**low, **{k: _merge(low[k], v, (*key, k), written) if k in low else v for k, v in high.items()}}
    for other in [other for other in written if other[: len(key)] == key]:
        del written[other]
    return high


def _read(path: Path, asked: str) -> str:
    remedy = "Give a YAML file, see configs/." if asked == "CONFIG" else "Names start at the folder of the file."
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(describe(asked, str(path), "no such file", remedy)) from None
    except IsADirectoryError:
        raise UserError(describe(asked, str(path), "is a folder", remedy)) from None
    except OSError as error:
        raise UserError(describe(asked, str(path), f"can't be read: {error.strerror}", remedy)) from None
    except UnicodeDecodeError as error:
        raise UserError(describe(asked, str(path), f"not UTF-8 at byte {error.start}", "Save it as UTF-8.")) from None


def _values(places: Places, text: str) -> dict[Any, Any]:
    """Return what a YAML text says, with OmegaConf's reading of numbers (1e-5 is one)."""
    try:
        values = OmegaConf.to_container(OmegaConf.create(text)) if text.strip() else None
    except OmegaConfBaseException as error:
        raise reference_error(places, error) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        rule = "a configuration is a mapping of sections"
        raise UserError(describe(f"{places.file}:1", text.splitlines()[0], rule, "See configs/."))
    return values


def reference_error(places: Places, error: OmegaConfBaseException) -> UserError:
    """Return the complaint about a ``${...}`` that can't be read or followed."""
    name = (error.full_key or "").replace("[", ".").replace("]", "")
    return UserError(f"{places.of(key_path(name))}: {str(error).splitlines()[0]}. Check the ${{...}} references.")


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
                    raise UserError(describe(f"{path}:{line}", dotted(child), rule, "Keep one of the two."))
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
