"""The demonstration's word problems: sentences in English and in Swahili, with worked solutions of one step."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

NAMES = ("Asha", "Juma", "Neema", "Baraka", "Zawadi", "Imani", "Rehema", "Musa")


@dataclass(frozen=True)
class Thing:
    """Something to count, with the words that agree with its Swahili noun class."""

    english: str
    swahili: str
    how_many: str
    remained: str


THINGS = (
    Thing("mangoes", "maembe", "mangapi", "yamebaki"),
    Thing("oranges", "machungwa", "mangapi", "yamebaki"),
    Thing("eggs", "mayai", "mangapi", "yamebaki"),
    Thing("books", "vitabu", "vingapi", "vimebaki"),
    Thing("cups", "vikombe", "vingapi", "vimebaki"),
    Thing("bananas", "ndizi", "ngapi", "zimebaki"),
    Thing("pens", "kalamu", "ngapi", "zimebaki"),
    Thing("bags", "mifuko", "mingapi", "imebaki"),
)

# Words that mean the same in both sentences of a template, for code-switching.
DICTIONARY = {
    **{thing.english: thing.swahili for thing in THINGS},
    "now": "sasa",
    "more": "zaidi",
    "buys": "ananunua",
    "collects": "anakusanya",
    "morning": "asubuhi",
    "evening": "jioni",
    "gives": "anampa",
    "but": "lakini",
    "lost": "akapoteza",
    "still": "bado",
    "baskets": "vikapu",
    "every": "kila",
    "days": "siku",
}


@dataclass(frozen=True)
class Template:
    """One kind of problem: its sentence in both languages, its operation, and the numbers it takes."""

    english: str
    swahili: str
    operator: str
    first: range
    second: range


_ADD = (range(2, 13), range(2, 13))
_SUBTRACT = (range(5, 16), range(2, 13))
_MULTIPLY = (range(2, 10), range(2, 10))
TEMPLATES = (
    Template(
        "{n} has {a} {t} and buys {b} more {t}. How many {t} does {n} have now?",
        "{n} ana {ts} {a} na ananunua {ts} {b} zaidi. Sasa {n} ana {ts} {q}?",
        "+", *_ADD,
    ),
    Template(
        "{n} collects {a} {t} in the morning and {b} {t} in the evening. How many {t} does {n} collect in all?",
        "{n} anakusanya {ts} {a} asubuhi na {ts} {b} jioni. {n} anakusanya {ts} {q} kwa jumla?",
        "+", *_ADD,
    ),
    Template(
        "{n} has {a} {t} and gives {b} {t} to {m}. How many {t} are left?",
        "{n} ana {ts} {a} na anampa {m} {ts} {b}. {ts} {q} {r}?",
        "-", *_SUBTRACT,
    ),
    Template(
        "{n} had {a} {t} but lost {b} of them. How many {t} does {n} still have?",
        "{n} alikuwa na {ts} {a} lakini akapoteza {ts} {b}. {n} bado ana {ts} {q}?",
        "-", *_SUBTRACT,
    ),
    Template(
        "There are {a} baskets with {b} {t} in each. How many {t} are there in all?",
        "Kuna vikapu {a}, na kila kikapu kina {ts} {b}. Kuna {ts} {q} kwa jumla?",
        "x", *_MULTIPLY,
    ),
    Template(
        "{n} buys {a} {t} every day for {b} days. How many {t} does {n} buy in all?",
        "{n} ananunua {ts} {a} kila siku kwa siku {b}. {n} ananunua {ts} {q} kwa jumla?",
        "x", *_MULTIPLY,
    ),
)  # fmt: skip

# One problem in this many is held out.
_HOLD_OUT = 8


@dataclass(frozen=True)
class WordProblem:
    """One problem in both languages with its worked solution."""

    english: str
    swahili: str
    solution: str
    answer: int

    @property
    def held_out(self) -> bool:
        """Whether no training stage may see it, decided by its English sentence alone."""
        digest = hashlib.blake2b(self.english.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % _HOLD_OUT == 0


def word_problems(seed: int) -> Iterator[WordProblem]:
    """Yield distinct problems without end but for the supply, in an order set by ``seed``."""
    random_source = random.Random(seed)
    seen: set[str] = set()
    supply = sum(len(t.first) * len(t.second) for t in TEMPLATES) * len(NAMES) * len(THINGS) // 2
    for _ in range(supply):
        template = random_source.choice(TEMPLATES)
        a, b = random_source.choice(template.first), random_source.choice(template.second)
        thing = random_source.choice(THINGS)
        name, other = random_source.sample(NAMES, 2)
        if template.operator == "-" and b >= a:
            continue
        problem = _fill(template, a, b, thing, name, other)
        if problem.english not in seen:
            seen.add(problem.english)
            yield problem


def _fill(template: Template, a: int, b: int, thing: Thing, name: str, other: str) -> WordProblem:
    answer = {"+": a + b, "-": a - b, "x": a * b}[template.operator]
    words = {
        "n": name, "m": other, "a": a, "b": b, "t": thing.english, "ts": thing.swahili, "q": thing.how_many,
        "r": thing.remained,
    }  # fmt: skip
    swahili = template.swahili.format(**words)
    for end in (". ", "? "):
        # A sentence that begins with the thing counted takes a capital.
        head, found, tail = swahili.partition(end)
        if found:
            swahili = head + found + tail[:1].upper() + tail[1:]
    solution = f"{a} {template.operator} {b} = {answer} #### {answer}"
    return WordProblem(template.english.format(**words), swahili, solution, answer)
