"""What a translator is, and how one that knows lines alone translates texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from megatron_copsd.errors import UserError, describe
from megatron_copsd.languages import Language

_LETTER = re.compile(r"[^\W\d_]")


class Translator(Protocol):
    """Translates texts; a text that it can make nothing of comes back empty, and is rejected later."""

    def translate(self, texts: Sequence[str], source: Language, target: Language) -> list[str]:
        """Return a translation of each text, in order.

        Raises:
            UserError: a language is not among those it knows.
        """
        ...


def translated(translator: Translator, texts: Sequence[str], source: Language, target: Language) -> list[str]:
    """Translate, and see that what comes back belongs to what was given.

    Raises:
        UserError: the translator gave another number of texts, or something else than texts.
    """
    found = translator.translate(texts, source, target)
    if len(found) != len(texts) or not all(isinstance(text, str) for text in found):
        rule = f"the translator gave {len(found)} results for {len(texts)} texts, or results that are no texts"
        raise UserError(describe("sdrrl.translator", type(translator).__name__, rule, "Use another translator."))
    return found


class Lines(Protocol):
    """Translates single lines."""

    def lines(self, lines: Sequence[str], source: Language, target: Language) -> Sequence[str | None]:
        """Return a translation of each line, in order; None where there is none.

        Raises:
            UserError: a language is not among those it knows.
        """
        ...


class LineTranslator:
    """Translates texts line by line; implements ``Translator``.

    Lines without a letter stay as they are. A text of which a line has no translation has none: with a hole it would be
    another text.
    """

    def __init__(self, by: Lines) -> None:
        self._by = by

    def translate(self, texts: Sequence[str], source: Language, target: Language) -> list[str]:
        """See ``Translator``."""
        split = [text.split("\n") for text in texts]
        wanted = list(dict.fromkeys(line for text in split for line in text if _LETTER.search(line)))
        # Lines of one length side by side: less padding.
        wanted.sort(key=len)
        done = dict(zip(wanted, self._by.lines(wanted, source, target), strict=True))
        return [_joined([done.get(line, line) for line in text]) for text in split]


def _joined(lines: Sequence[str | None]) -> str:
    return "" if any(line is None for line in lines) else "\n".join(line for line in lines if line is not None)
