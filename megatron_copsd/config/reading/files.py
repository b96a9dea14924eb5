"""Configuration files: their YAML, the files that they extend, and where each value was written.

``extends: FILE``, or a list of files, at the top of a file takes over what those say: each with all that it extends
itself, a later one over an earlier one, and the file's own settings over all. Mappings merge, key by key; anything
else, a list or a null too, replaces what was there. A name starts at the folder of the file that says it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_copsd.config.reading.document import KeyPath, dotted, read_document
from megatron_copsd.errors import UserError, describe, shortened

EXTENDS = "extends"
_MOST_BYTES = 1 << 20


def key_path(name: str) -> KeyPath:
    """Return a setting's keys; a number is a place in a list: ``data.train.0.path``."""
    return tuple(int(part) if part.isascii() and part.isdecimal() else part for part in name.split("."))


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
        return f"{self.source} ({shortened(self.override)})" if self.override else self.source


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
        values = merged(self.values, upper.values, (), written)
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
        """Return the place of a setting; of what was written in it; or of the nearest section around a default."""
        if key in self.written:
            return self.written[key]
        within = (place for other, place in self.written.items() if other[: len(key)] == key)
        around = (self.written[key[:depth]] for depth in range(len(key), 0, -1) if key[:depth] in self.written)
        return next(within, None) or next(around, Place(str(self.file)))

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
    return _read_chain(path, "CONFIG", (), {})


def _read_chain(path: Path, asked: str, above: tuple[Path, ...], done: dict[str, Layer]) -> Layer:
    """Read one file and what it extends.

    Args:
        path: the file.
        asked: what named it, for the error.
        above: the files that led here, each extending the next.
        done: what was read before, by the file's real path: on many ways to one file it is read once.
    """
    real = os.path.realpath(path)
    if real in done:
        return done[real]
    text = _read(path, asked)
    document = read_document(text, lambda line: f"{path}:{line}")
    written = {key: Place(f"{path}:{line}") for key, line in document.lines.items()}
    places = Places(path, written)
    values = {} if document.value is None else document.value
    if not isinstance(values, dict):
        rule = "a configuration is a mapping of sections"
        raise UserError(describe(f"{path}:1", text.splitlines()[0], rule, "See configs/."))
    layer = Layer({}, {})
    for key, name in _extended(values, places):
        place = f"{places.of(key)}: {dotted(key)}"
        base, chain = path.parent / os.path.expanduser(name), (*above, path)
        reached = [os.path.realpath(file) for file in chain]
        if os.path.realpath(base) in reached:
            cycle = " -> ".join(map(str, (*chain[reached.index(os.path.realpath(base)) :], base)))
            raise UserError(describe(place, name, f"the files extend each other: {cycle}", "Remove one of the links."))
        layer = layer.under(_read_chain(base, place, chain, done))
    values.pop(EXTENDS, None)
    own = Layer(values, {key: place for key, place in written.items() if key[0] != EXTENDS})
    done[real] = layer.under(own)
    return done[real]


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


def merged(low: Any, high: Any, key: KeyPath, written: dict[KeyPath, Place]) -> Any:
    """Return ``high`` over ``low``, and take what it replaces, at ``key`` and below, out of ``written``."""
    if isinstance(low, dict) and isinstance(high, dict):
        return {**low, **{k: merged(low[k], v, (*key, k), written) if k in low else v for k, v in high.items()}}
    for other in [other for other in written if other[: len(key)] == key]:
        del written[other]
    return high


def _read(path: Path, asked: str) -> str:
    remedy = "Give a YAML file, see configs/." if asked == "CONFIG" else "Names start at the folder of the file."
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            rule = "is a folder"
        elif not stat.S_ISREG(status.st_mode):
            rule = "is no regular file"  # to read a pipe could last for ever
        elif status.st_size > _MOST_BYTES:
            rule = f"has more than {_MOST_BYTES:,} bytes"
        else:
            rule, data = "", path.read_bytes()
    except FileNotFoundError:
        rule = "no such file"
    except OSError as error:
        rule = f"can't be read: {error.strerror}"
    if rule:
        raise UserError(describe(asked, str(path), rule, remedy))
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line, found = data.count(b"\n", 0, error.start) + 1, data[error.start : error.end]
        raise UserError(describe(f"{path}:{line}", found, "the file is not UTF-8", "Save it as UTF-8.")) from None
