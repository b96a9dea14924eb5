"""What a response's final answer is, and whether it is right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from megatron_copsd.errors import UserError, describe
from megatron_copsd.grading.notation import fold
from megatron_copsd.grading.numbers import readings
from megatron_copsd.grading.quantities import scan_numbers

Method = Literal["boxed", "marker", "last_number"]
METHODS: tuple[Method, ...] = ("boxed", "marker", "last_number")

_BRACES = re.compile(r"\\(?:boxed|f(?:rame)?box)\s*\{|(?<!\\)[{}]")
_MARKER = "####"
_MARKED_LENGTH = 300
_BULLET = re.compile(r"^[-–—•*]\s+")
_THINK_END = "</think>"


@dataclass(frozen=True)
class Extraction:
    """A final answer as a response states it.

    Attributes:
        value: its text, never empty.
        method: ``boxed`` (``\\boxed{...}``), ``marker`` (behind ``####``), or ``last_number`` (the last number of a
            response that does not mark its answer). No phrase of any one language marks an answer, so that responses
            in all languages are graded alike.
    """

    value: str
    method: Method


def extract_answer(text: str, methods: Sequence[Method] = METHODS) -> Extraction | None:
    """Return the final answer of a response, or None where it has none.

    A box counts when it is closed and not empty; of several the last one does, so a response cut inside its last box
    keeps an earlier one. What follows the last ``</think>`` is looked at first, the thinking only if that has none.

    Args:
        text: the response.
        methods: ways to find an answer, in ``METHODS``; ``("boxed",)`` is the protocol of the COPSD paper.
    """
    thinking, end, answer = text.rpartition(_THINK_END)
    parts = (answer, thinking) if end else (text,)
    for part in parts:
        for method in METHODS:
            value = _FINDERS[method](part) if method in methods else None
            if value is not None:
                return Extraction(value, method)
    return None


def grade(prediction: str | None, reference: str) -> bool:
    """Whether an answer says the same as the reference.

    Numbers are compared exactly (18 is 18.0, $18, 18 dollars and ፲፰, never 18.0001); an answer whose separators leave
    two readings (1.000) is right if either is. What is not one plain number is compared as text, markup, spaces and
    case aside: equivalent algebra is not recognised.
    """
    if prediction is None:
        return False
    key = answer_key(reference)
    if isinstance(key, Fraction):
        return key in readings(_unboxed(prediction))
    return bool(key) and answer_key(prediction) == key


def answer_key(answer: str) -> Fraction | str:
    """Return what answers that mean the same have in common: the exact value of a number, else the plain text."""
    answer = _unboxed(answer)
    values = readings(answer)
    return values[0] if values else "".join(fold(answer).split()).replace("$", "").rstrip(".").casefold()


def reward(text: str, reference: str | None, methods: Sequence[Method] = METHODS) -> float:
    """Return 1.0 if the response's final answer is right, else 0.0.

    Raises:
        UserError: the problem has no reference answer.
    """
    extraction = extract_answer(text, methods)
    return float(grade(extraction.value if extraction else None, require_reference(reference)))


def require_reference(reference: str | None) -> str:
    """Return the reference answer.

    Raises:
        UserError: there is none, or it is blank.
    """
    if reference is None or not reference.strip():
        rule = "a problem without a final answer cannot be graded"
        raise UserError(describe("answer", reference, rule, "Leave it out of the graded problems."))
    return reference


def _unboxed(answer: str) -> str:
    return _last_box(answer) or answer


def _last_box(text: str) -> str | None:
    """Return the content of the box that opens last among those that are closed and not empty."""
    found = (-1, "")
    open_braces: list[int | None] = []  # where a box's content starts, or None for another brace
    for token in _BRACES.finditer(text):
        if token[0].endswith("{"):
            open_braces.append(token.end() if token[0] != "{" else None)
        elif open_braces and (start := open_braces.pop()) is not None:
            content = text[start : token.start()].strip()
            if content:
                found = max(found, (start, content))
    return found[1] or None


def _marked(text: str) -> str | None:
    """Return what the last marker with something behind it on its line marks: the first number there, if any."""
    for line in reversed(text.split("\n")):
        for piece in reversed(line.split(_MARKER)[1:]):
            marked = _BULLET.sub("", piece.strip()[:_MARKED_LENGTH])
            if marked:
                number = None if readings(marked) else next(scan_numbers(fold(marked)), None)
                return number or marked
    return None


def _last_number(text: str) -> str | None:
    return next(scan_numbers(fold(text), backwards=True), None)


_FINDERS = {"boxed": _last_box, "marker": _marked, "last_number": _last_number}
