"""Arguments that several commands take, said and refused in the same words; nothing heavy is imported for them."""

from __future__ import annotations

import argparse


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


def positive(text: str) -> int:
    """Type of an argument: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 1")
    return int(text)


def share(text: str) -> float:
    """Type of an argument: a part of a whole, above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number above 0 and at most 1")
    return value
