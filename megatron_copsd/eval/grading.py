"""Final answers: found in a response and compared as exact numbers.

Graded are plain numbers as people of many countries write them: any script's digits, separators, currencies, units,
fractions. LaTeX algebra is out of scope: two answers that are not numbers are equal when their text is, after
normalisation.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from megatron_copsd.errors import UserError, describe

Method = Literal["boxed", "marker", "last_number"]


@dataclass(frozen=True)
class Extraction:
    """A final answer and how it was found; ``last_number`` means the response did not keep to a format."""

    value: str
    method: Method


def extract_answer(text: str) -> Extraction | None:
    r"""Return the final answer of a response, or None where there is no number in it.

    Looked at is what follows the last ``</think>``, or everything where nothing does. In order: the last complete and
    non-empty ``\boxed{}``; what follows the last ``####`` on its line; the last number.
    """
    final = text.rpartition("</think>")[2]
    for part in (final, text) if final.strip() else (text,):
        boxed = _last_boxed(part)
        if boxed is not None:
            return Extraction(boxed, "boxed")
        marked = [match.strip() for match in re.findall(r"####([^\n]*)", part) if match.strip()]
        if marked:
            return Extraction(marked[-1], "marker")
        numbers = _NUMBER_IN_TEXT.findall(_ascii(part))
        if numbers:
            return Extraction(numbers[-1], "last_number")
    return None


def grade(prediction: str, reference: str) -> bool:
    """Return whether two answers are the same number, exactly, or failing that the same text."""
    return canonical(prediction) == canonical(reference)


def reward(text: str, answer: str | None) -> float:
    """Return 1.0 where the response's final answer is right, else 0.0.

    Raises:
        UserError: the problem has no answer to grade against.
    """
    if answer is None:
        rule = "this problem has no answer, and grading needs one"
        raise UserError(describe("data", None, rule, "Drop such problems, or use an objective that does not grade."))
    found = extract_answer(text)
    return float(found is not None and grade(found.value, answer))


def canonical(answer: str) -> Fraction | str:
    r"""Return the exact number an answer states, or its normalised text where it states none.

    Separators: a comma or dot followed by exactly three digits groups thousands when it repeats, when the other one
    follows as decimal mark, or when it is a comma (``1,000``); a single dot before three digits is a decimal mark
    (``1.000`` is 1), as in every reference this project grades against. A single comma before other than three digits
    is a decimal mark (``3,5``). Spaces and apostrophes between digit groups group. ``%`` is a unit: 18 % is 18.
    """
    text = _strip_latex(_ascii(answer))
    fraction = _fraction(text)
    if fraction is not None:
        return fraction
    cjk = _chinese(text)
    if cjk is not None:
        return cjk
    numbers = _NUMBER_IN_TEXT.findall(_right_hand_side(text))
    if len(numbers) == 1:
        return _number(numbers[0])
    return re.sub(r"[\s$]+", "", text).lower().rstrip(".")


_NUMBER = r"[-+]?(?:\d{1,3}(?:[ ',.]\d{2,3})*[ ',.]\d{3}|\d+)(?:[.,]\d+)?(?:[eE][-+]?\d+)?"
# A minus counts as a sign only where no digit or word stands before it: 3-5 holds no negative five.
_NUMBER_IN_TEXT = re.compile(rf"(?<![\w.]){_NUMBER}(?!\d)")


def _last_boxed(text: str) -> str | None:
    """Return the content of the last complete, non-empty box; a box cut off by the token limit does not hide others."""
    for match in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                content = text[match.end() : end].strip()
                if content:
                    return content
                break
    return None


_SIGNS = str.maketrans({
    "\u2212": "-", "\u2013": "-", "\u2010": "-", "\u2011": "-", "\uff0d": "-", "\ufe63": "-",
    "\u066b": ".", "\u066c": ",", "\uff0c": ",", "\uff0e": ".", "\u2019": "'", "\u2044": "/", "\u00d7": "*",
    "\u00a0": " ", "\u202f": " ", "\u2009": " ", "\u2007": " ", "\uff05": "%", "\uff0f": "/",
})  # fmt: skip
_VULGAR = re.compile(r"(\d)?\s*([\u00bc-\u00be\u2150-\u215e])")


def _ascii(text: str) -> str:
    """Write every script's digits, and the signs around numbers, in ASCII."""
    text = _VULGAR.sub(lambda m: f"{m.group(1) or ''} {unicodedata.normalize('NFKC', m.group(2))}", text)
    text = _ethiopic(text.translate(_SIGNS)).translate(_SIGNS)
    return "".join(
        str(unicodedata.decimal(char)) if unicodedata.decimal(char, None) is not None else char for char in text
    )


def _strip_latex(text: str) -> str:
    text = re.sub(r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\(?:left|right|!|,|;|quad|qquad|displaystyle)(?![a-zA-Z])", "", text)
    text = text.replace("{,}", ",").replace("\\%", "%").replace("\\$", "$").replace("\\ ", " ").replace("~", " ")
    return text.strip().strip("$").strip()


def _right_hand_side(text: str) -> str:
    """Return what an equation states: ``x = 18`` states 18."""
    return text.rpartition("=")[2] if "=" in text else text


_FRACTION = re.compile(
    rf"^\D*?(?P<sign>-)?\s*(?:(?P<whole>\d+)\s+)?"
    rf"(?:\\[dt]?frac\s*\{{\s*(?P<top>{_NUMBER})\s*\}}\s*\{{\s*(?P<bottom>{_NUMBER})\s*\}}"
    rf"|(?P<num>\d+)\s*/\s*(?P<den>\d+))[^\d/]*$"
)
_MIXED_LATEX = re.compile(r"(\d)\s*(?=\\[dt]?frac)")


def _fraction(text: str) -> Fraction | None:
    match = _FRACTION.match(_MIXED_LATEX.sub(r"\1 ", _right_hand_side(text)))
    if match is None:
        return None
    top = _number(match["top"]) if match["top"] else Fraction(int(match["num"]))
    bottom = _number(match["bottom"]) if match["bottom"] else Fraction(int(match["den"]))
    if bottom == 0:
        return None
    value = Fraction(int(match["whole"] or 0)) + top / bottom
    return -value if match["sign"] else value


def _number(text: str) -> Fraction:
    """Read one number that matched ``_NUMBER``."""
    mantissa, _, exponent = text.lower().partition("e")
    digits = re.sub(r"[ ']", "", mantissa)
    marks = [char for char in digits if char in ",."]
    if marks:
        last = marks[-1]
        tail = digits.rpartition(last)[2]
        repeated = marks.count(last) > 1
        mixed = len(set(marks)) > 1
        groups = repeated or (last == "," and len(tail) == 3 and not mixed)
        decimal = None if groups else last
        digits = "".join("." if char == decimal else char for char in digits if char not in ",." or char == decimal)
    return Fraction(digits) * Fraction(10) ** int(exponent or 0)


_ETHIOPIC = {chr(0x1369 + i): i + 1 for i in range(9)} | {chr(0x1372 + i): 10 * (i + 1) for i in range(9)}
_HUNDRED, _TEN_THOUSAND = "\u137b", "\u137c"


def _ethiopic(text: str) -> str:
    """Replace runs of Ethiopic numerals by ASCII: tens and ones in pairs, multiplied by the hundreds that follow."""

    def value(match: re.Match[str]) -> str:
        total = pair = 0
        for char in match.group():
            if char == _HUNDRED:
                pair = (pair or 1) * 100
            elif char == _TEN_THOUSAND:
                total, pair = (total + (pair or 1)) * 10000, 0
            else:
                total, pair = (total + pair, _ETHIOPIC[char]) if pair >= 100 else (total, pair + _ETHIOPIC[char])
        return str(total + pair)

    return re.sub(r"[\u1369-\u137c]+", value, text)


_CHINESE_DIGITS = {char: i for i, char in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "兩": 2}
_CHINESE_UNITS = {"十": 10, "百": 100, "千": 1000}
_CHINESE_GROUPS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_CHINESE = re.compile(rf"^[{''.join((*_CHINESE_DIGITS, *_CHINESE_UNITS, *_CHINESE_GROUPS))}]+")


def _chinese(text: str) -> Fraction | None:
    """Read an answer that begins with a Chinese numeral, with any counting word behind it."""
    match = _CHINESE.match(text)
    if match is None or re.search(r"\d", text):
        return None
    total = group = digit = 0
    for char in match.group():
        if char in _CHINESE_DIGITS:
            digit = digit * 10 + _CHINESE_DIGITS[char]
        elif char in _CHINESE_UNITS:
            group, digit = group + (digit or 1) * _CHINESE_UNITS[char], 0
        else:
            total, group, digit = total + (group + digit or 1) * _CHINESE_GROUPS[char], 0, 0
    return Fraction(total + group + digit)
