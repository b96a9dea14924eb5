"""Languages by code: names, scripts and the short texts that prompts are made of."""

from __future__ import annotations

import difflib

from megatron_copsd.errors import UserError, describe
from megatron_copsd.languages.african import AFRICAN
from megatron_copsd.languages.entry import Language
from megatron_copsd.languages.world import WORLD

__all__ = ["LANGUAGES", "Language", "language", "language_problem"]

LANGUAGES = (*WORLD, *AFRICAN)


def _key(name: str) -> str:
    return name.strip().replace("-", "_").casefold()


def _index() -> dict[str, Language]:
    index: dict[str, Language] = {}
    for entry in LANGUAGES:
        for name in (entry.code, *entry.aliases, entry.name):
            owner = index.setdefault(_key(name), entry)
            assert owner is entry, f"{name} names both {owner.code} and {entry.code}"
    return index


_BY_NAME = _index()


def language(name: str, where: str = "language") -> Language:
    """Return the language with this code, ISO 639 or FLORES alias, or English name; case does not matter.

    Args:
        name: e.g. ``SWA``, ``sw``, ``swh_Latn`` or ``Swahili``.
        where: setting or file:line the name was read from, for the error.

    Raises:
        UserError: no language has this name; the nearest names and all codes are listed.
    """
    problem = language_problem(name)
    if problem:
        raise UserError(describe(where, name, *problem))
    return _BY_NAME[_key(name)]


def language_problem(name: str) -> tuple[str, str] | None:
    """Return the rule that a name breaks and the remedy, if it is no language's; None if it is."""
    if _key(name) in _BY_NAME:
        return None
    near = difflib.get_close_matches(_key(name), _BY_NAME, n=3, cutoff=0.5)
    codes = dict.fromkeys(_BY_NAME[match].code for match in near)
    suggestion = f"Did you mean {' or '.join(codes)}? " if codes else ""
    known = " ".join(entry.code for entry in LANGUAGES)
    return "unknown language", f"{suggestion}Known codes: {known}."
