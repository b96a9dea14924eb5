"""What a build starts from: questions with responses, and sentences in two languages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from megatron_copsd.config.schema import DataSource
from megatron_copsd.config.sections.sdrrl import CorpusSettings, QuestionSettings
from megatron_copsd.data.rows import Row, read_rows, read_tsv
from megatron_copsd.errors import UserError, describe

# GSM8K's worked solutions say what a calculator was given: <<48/2=24>>.
_CALCULATOR = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Question:
    """A row of the English instruction data.

    Attributes:
        key: ``file name:n``.
        number: position in the file, from 1.
        where: ``file:line``.
        problem: the question.
        response: the data's, English.
    """

    key: str
    number: int
    where: str
    problem: str
    response: str


@dataclass(frozen=True)
class SentencePair:
    """A sentence in English and in another language; ``key`` is ``file name:n``, ``where`` is ``file:line``."""

    key: str
    where: str
    english: str
    other: str


def read_questions(settings: QuestionSettings) -> list[Question]:
    """Read the English instruction data.

    Raises:
        UserError: a row is malformed, or there are fewer rows than are asked for.
    """
    source = DataSource(path=settings.path, layout="reference", language="EN")
    rows = read_rows(source, "sdrrl.questions")
    make = {"gsm8k": _gsm8k, "alpaca": _alpaca}[settings.layout]
    chosen = _window(rows, settings.first, settings.count, "sdrrl.questions", settings.path)
    return [make(row) for row in chosen]


def _gsm8k(row: Row) -> Question:
    response = _CALCULATOR.sub("", row.text("answer"))
    return Question(row.id, row.number, row.where, row.text("question"), response)


def _alpaca(row: Row) -> Question:
    blank = not str(row.fields.get("input") or "").strip()
    problem = row.text("instruction") if blank else f"{row.text('instruction')}\n{row.text('input')}"
    return Question(row.id, row.number, row.where, problem, row.text("output"))


def read_corpus(settings: CorpusSettings, where: str) -> list[SentencePair]:
    """Read sentences in two languages.

    Raises:
        UserError: a line is malformed, or there are fewer than are asked for.
    """
    rows = read_tsv(settings.path, ("english", "other"))
    chosen = _window(rows, settings.first, settings.count, where, settings.path)
    return [SentencePair(row.id, row.where, row.text("english"), row.text("other")) for row in chosen]


def _window(rows: Sequence[Row], first: int, count: int | None, where: str, path: str) -> list[Row]:
    wanted = first + (count or 1)
    if len(rows) < wanted:
        rule = f"{path} has {len(rows)} rows, and first + count reaches {wanted}"
        name, value = ("first", first) if count is None else ("count", count)
        raise UserError(describe(f"{where}.{name}", value, rule, "Lower first or count."))
    return list(islice(rows, first, None if count is None else wanted))
