"""Arguments that several commands take, said and refused in the same words; nothing heavy is imported for them."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from megatron_copsd.config.paths import expanded

_DIGITS = 9
_SHOWN = 80


def new_parser(
    command: str, description: str | None, examples: str, *, allow_abbrev: bool = True
) -> argparse.ArgumentParser:
    """Return the parser of ``copsd COMMAND``.

    Args:
        command: after ``copsd``, such as "bench loss".
        description: what it does; None only where docstrings are stripped.
        examples: shown below the options, as written.
        allow_abbrev: whether a long option may be cut short.
    """
    return argparse.ArgumentParser(
        prog=f"copsd {command}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=allow_abbrev,
    )


def add_configuration(parser: argparse.ArgumentParser, about: str = "YAML file", *, required: bool = True) -> None:
    """Add the configuration file and its overrides: ``args.config`` and ``args.overrides``.

    With ``parse_intermixed_args``, overrides may stand before, after and between the options.

    Args:
        parser: to add them to.
        about: the file.
        required: without it, ``args.config`` may be None.
    """
    if required:
        parser.add_argument("config", metavar="CONFIG", help=about)
    else:
        parser.add_argument("config", metavar="CONFIG", nargs="?", help=about)
    # Without a default of its own, argparse counts "any number" among what is required and missing.
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help="settings to change")


def override(setting: str, value: object) -> str:
    """Return the override that sets a setting to a text, whatever that looks like to YAML, or to what is made of texts.

    Args:
        setting: as ``section.key``.
        value: a text, or lists and mappings of values.
    """
    return f"{setting}={json.dumps(_literal(value), ensure_ascii=False)}"


def _literal(value: object) -> object:
    """The value with no reference to another setting in its texts."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, Mapping):
        return {key: _literal(one) for key, one in value.items()}
    if isinstance(value, Sequence):
        return [_literal(one) for one in value]
    return value


def positive(text: str) -> int:
    """Type of an argument: a whole number of at least 1."""
    return _whole(text, 1)


def whole(text: str) -> int:
    """Type of an argument: a whole number of at least 0."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > _DIGITS or int(text) < least:
        rule = f"must be a whole number of at least {least} and at most {_DIGITS} digits"
        raise argparse.ArgumentTypeError(f"{text[:_SHOWN]!r}: {rule}")
    return int(text)


def above_zero(text: str) -> float:
    """Type of an argument: a finite number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text[:_SHOWN]!r}: must be a number above 0")
    return value


def share(text: str) -> float:
    """Type of an argument: a part of a whole, above 0 and at most 1."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text[:_SHOWN]!r}: must be a number above 0 and at most 1")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def path(text: str) -> Path:
    """Type of an argument: a path, which may begin with ``~``."""
    try:
        if text:
            return Path(expanded(text))
        rule = "is no path"
    except ValueError as error:
        rule = str(error)
    raise argparse.ArgumentTypeError(f"{text!r}: {rule}")


def names(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """Return the type of an argument: names of ``known`` with commas between, each once."""

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(part.strip() for part in text.split(","))
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name[:_SHOWN]!r}: is none of {', '.join(known)}")
            if found.count(name) > 1:
                raise argparse.ArgumentTypeError(f"{name!r}: is named twice")
        return found

    return parse
