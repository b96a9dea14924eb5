"""The quantities that a running text states: not every number does.

A text is read from left to right as tokens; the first rule that fits at a place takes it. What a rule of ``_OTHER``
takes states no quantity: an item's number, an identifier (H2O, x1), an ordinal, a date, a time, a range, a power, a
root. A dash is a minus right before its number, and then only where nothing stands right before it; apart from its
number it is a bullet or a dash, but where an equation or a formula begins.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from megatron_copsd.grading.notation import CURRENCY, without_asides
from megatron_copsd.grading.numbers import NUMBER, is_coefficient, read_scale, readings, without_unit_powers

# Letters that may stand right before the digits of an amount of money; others make an identifier of them.
_MONEY = r"(?:KSh|Ksh|TSh|USh|Sh|sh|Rs|Tk|Br|Fr|Ft|Kr|kr|Kč|zł|GH|[RNKPM]|[A-Z]{3})\.?\d"
_ORDINAL_ENDS = unicodedata.normalize(
    "NFKC", "st|nd|rd|th|ers?|ère|ere|[eèé]mes?|e|o|a|-(?:й|я|е|го|му|м|ю|х)|ffaa|lia|eel|ম|য়|র্থ|ষ্ঠ|তম|వ|ኛ"
)
_THAI_ORDINAL = unicodedata.normalize("NFKC", "(?:วัน|ข้อ|ครั้ง|คน|ตัว|ลำดับ|สัปดาห์|ปี|หน้า|บรรทัด)ที่")
_NUMERAL = r"\d[\d.,]*"
_OTHER = re.compile(
    rf"(?m:^)[ *_>#-]{{0,8}}[(\[]?(?P<item>\d{{1,2}})[.)\]][*_ ]*\ (?=\ *\S)"
    rf"|(?<![A-Za-z0-9])(?!{_MONEY})(?:[A-Za-z]|[A-Z][a-z]|[A-Z]{{2}}|(?:[A-Z][a-z]?\d{{0,3}}){{2,8}})_?\{{?\d\w*"
    rf"|(?<![\d.,=])\d+(?:{_ORDINAL_ENDS})(?!\w)"
    rf"|第\ ?\d+|{_THAI_ORDINAL}\ ?\d+|[№#]\ ?\d+"
    rf"|\d+(?:/\d+){{2,}}|\d+(?::\d+)+|{_NUMERAL}(?:-[{CURRENCY}]?{_NUMERAL})+"
    rf"|(?!10\ ?\^){_NUMERAL}\ ?\^\ ?\{{?[-+]?\d+|(?:\^|(?<=[\w}}])_)\s*[\[{{]?\s*[-+]?\d+"
    rf"|(?:√|\\sqrt)\s*(?:\[\d+\])?\s*\{{?\s*\d+"
)
_TOKEN = re.compile(rf"(?P<other>{_OTHER.pattern})|{NUMBER.pattern}")
# How a number came about: "so 18 (9 + 9)." In a short answer the same may be a product.
_WORKING = re.compile(r"(?<=\w)\ \(=?\ *\d[^()A-Za-z\n]*[-+×*/=][^()A-Za-z\n]*\)(?=[ .!?。]*(?:\n|$))")
_DASH = re.compile(rf"-(?P<gap>[ {CURRENCY}]*)$")


def scan_numbers(text: str, *, backwards: bool = False) -> Iterator[str]:
    """Yield the quantities of a running text, each as a piece ``readings`` has a value for.

    Args:
        text: as ``fold`` returns it.
        backwards: the last one first.
    """
    text = without_unit_powers(without_asides(_WORKING.sub(" ", text)))
    found: list[tuple[int, int]] = []
    items = {0}
    for token in _TOKEN.finditer(text):
        if token["item"] and int(token["item"]) - 1 not in items:
            found.append(token.span("item"))  # "18. That is all." begins no list
        elif token["item"]:
            items.add(int(token["item"]))
        elif token["other"] is None and not is_coefficient(text[token.end() : token.end() + 8], 1):
            found.append(token.span())
    for start, end in reversed(found) if backwards else found:
        behind = text[end : end + 40]
        scale = behind[: len(behind) - len(read_scale(behind)[1])]
        piece = _sign(text[max(0, start - 40) : start]) + text[start:end] + scale
        if readings(piece):
            yield piece


def _sign(before: str) -> str:
    """Return "-" where what stands before a number ends in its minus, else nothing."""
    dash = _DASH.search(before)
    if dash is None:
        return ""
    ahead = before[: dash.start()]
    nearest = ahead.rstrip(" ")[-1:]
    if " " in dash["gap"]:  # a bullet, or a dash between words
        return "-" if nearest and nearest in "=<>(+×*/$" and not ahead.endswith("\n") else ""
    # Right behind a word a hyphen, behind a number an operator; "Jibu:-18" and "--18" only set the number off.
    joins = ahead[-1:].isalnum() or ahead[-1:] in (":", "-", ")", "]", "}", "%") or nearest.isdigit()
    return "" if joins else "-"
