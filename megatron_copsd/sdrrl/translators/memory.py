"""Translations that are there already, by people or by a service, as a table of lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_copsd.config.sections.sdrrl import MemorySettings
from megatron_copsd.data.rows import read_tsv
from megatron_copsd.languages import Language, language


class MemoryLines:
    """Looks English lines up; implements ``Lines``."""

    def __init__(self, settings: Sequence[MemorySettings]) -> None:
        """Read the tables.

        Raises:
            UserError: a row is malformed, or two rows translate the same line differently.
        """
        self._known = {language(one.language).code: _table(one.path) for one in settings}

    def lines(self, lines: Sequence[str], source: Language, target: Language) -> list[str | None]:
        """See ``Lines``; None for a line that is not in the table."""
        assert source.code == "EN", source.code
        return [self._known[target.code].get(line.strip()) for line in lines]


def _table(path: str) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for row in read_tsv(path, ("english", "other")):
        english, other = row.text("english").strip(), row.text("other").strip()
        if found.setdefault(english, other) != other:
            raise row.error(english, f"an earlier row translates it otherwise ({found[english]!r})", "Keep one.")
    return found
