"""Code-switching: words of a question said in the other language, after a bilingual dictionary.

As Lin et al. 2021 build theirs: one direction each way, LL and LT from English, TL and TT from the target language.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import regex

from megatron_copsd.errors import UserError, describe
from megatron_copsd.sdrrl.chance import choose, uniform

# A word, with apostrophes and hyphens that stand inside of it. Vowel signs and tone marks belong to their letter, which
# Python's own expressions do not know.
_WORD = regex.compile(r"\p{L}[\p{L}\p{M}\p{N}\u200c\u200d]*(?:['\u2019-]\p{L}[\p{L}\p{M}\p{N}\u200c\u200d]*)*")
_NOTE = regex.compile(r"\s*[\(\[][^\)\]]*[\)\]]")
_SHOWN = 80

Form = Literal["gatitos", "muse"]


class Switch(NamedTuple):
    """A word that was replaced: its place among the question's words, from 0, and both words."""

    place: int
    before: str
    after: str


@dataclass(frozen=True)
class Dictionary:
    """Words of one language, lower-cased and composed, with what they are called in the other."""

    words: Mapping[str, Sequence[str]]

    def switched(self, text: str, share: float, *names: object) -> tuple[str, tuple[Switch, ...]]:
        """Replace each word that is in the dictionary with a chance.

        Args:
            text: a question.
            share: the chance, p of the paper.
            names: of the random choices.

        Returns:
            The text, and what was replaced in it.
        """
        parts: list[str] = []
        switches: list[Switch] = []
        end = 0
        for place, match in enumerate(_WORD.finditer(text)):
            others = self.words.get(_key(match[0]))
            if not others or uniform(*names, place) >= share:
                continue
            other = choose(others, *names, place, "word")
            if match[0][0].isupper():
                other = other[0].upper() + other[1:]
            parts += [text[end : match.start()], other]
            end = match.end()
            switches.append(Switch(place, match[0], other))
        return "".join([*parts, text[end:]]), tuple(switches)


def read_dictionary(path: str, form: Form) -> tuple[Dictionary, Dictionary]:
    """Read a dictionary from English; returns it and its inverse.

    Notes in brackets are left out, and so are parts of words, which a hyphen marks. What has several words on the side
    that is looked up is of no use there, as a question is looked up word by word; the other side may have several.

    Raises:
        UserError: a line has not two columns, or nothing is left.
    """
    pairs: list[tuple[str, str]] = []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(describe(path, error.reason, "the file is not UTF-8", "Save it as UTF-8.")) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        columns = line.split("\t") if form == "gatitos" else line.split()
        if len(columns) != 2 or not all(column.strip() for column in columns):
            parted = "a tab" if form == "gatitos" else "space"
            rule = f"a line of a {form} dictionary has two columns parted by {parted}"
            raise UserError(describe(f"{path}:{number}", line[:_SHOWN], rule, "Correct the line, or the form."))
        english, other = (" ".join(_NOTE.sub("", column).split()) for column in columns)
        if english and other and not any(text.startswith("-") or text.endswith("-") for text in (english, other)):
            pairs.append((english, other))
    both = _looked_up(pairs), _looked_up([(other, english) for english, other in pairs])
    if not all(dictionary.words for dictionary in both):
        raise UserError(describe(path, len(lines), "no word is left of so many lines", "Give another dictionary."))
    return both


def _looked_up(pairs: Sequence[tuple[str, str]]) -> Dictionary:
    words: dict[str, dict[str, None]] = {}
    for word, other in pairs:
        if _WORD.fullmatch(unicodedata.normalize("NFC", word)) and _key(word) != _key(other):
            words.setdefault(_key(word), {})[other] = None
    return Dictionary({word: tuple(others) for word, others in words.items()})


def _key(word: str) -> str:
    return unicodedata.normalize("NFC", word).lower()
