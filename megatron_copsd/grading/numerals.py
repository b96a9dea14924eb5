"""Numerals that are not positional decimal digits: Ethiopic and Chinese, where what they say is well defined."""

from __future__ import annotations

import re

_ETHIOPIC_UNITS = {chr(0x1369 + i): i + 1 for i in range(9)}
_ETHIOPIC_TENS = {chr(0x1372 + i): 10 * (i + 1) for i in range(9)}
_ETHIOPIC_HUNDRED, _ETHIOPIC_MYRIAD = "፻", "፼"
_ETHIOPIC_RUN = re.compile(r"[\u1369-\u137c]+")
# Tens, then a unit, then what they count; each part may be missing, but a hundred is counted by less than a hundred.
_ETHIOPIC_GROUP = "(?:[፲-፺]?[፩-፱]?፻)?[፲-፺]?[፩-፱]?"
_ETHIOPIC_FORM = re.compile(f"(?:{_ETHIOPIC_GROUP}፼){{0,3}}{_ETHIOPIC_GROUP}")

_CHINESE_DIGITS = {"零": 0, "〇": 0, "两": 2, "兩": 2, "貳": 2, "參": 3, "陸": 6}
_CHINESE_DIGITS |= {digit: value for value, digit in enumerate("一二三四五六七八九", start=1)}
_CHINESE_DIGITS |= {digit: value for value, digit in enumerate("壹贰叁肆伍陆柒捌玖", start=1)}
_CHINESE_VARIANTS = str.maketrans("拾佰仟萬億〇", "十百千万亿零")
_D = "[一二三四五六七八九两兩壹贰貳叁參肆伍陆陸柒捌玖]"
# Below a myriad. A last digit right after 百 or 千 is left out on purpose: 一百五 is 150 in Chinese speech and
# 百五 is 105 in Japanese.
_SECTION = re.compile(rf"(?:({_D}?)千)?零?(?:({_D}?)百)?零?(?:({_D}?)十)?零?({_D}?)")
_CHINESE_POSITIONAL = re.compile(rf"(?:{_D}|零){{2,}}")
_CHINESE_COUNTED = ("", "元", "美元", "円", "ドル", "个", "個", "人", "天", "岁", "歳")


def fold_ethiopic(text: str) -> str:
    """Replace every well-formed run of Ethiopic numerals by ASCII digits; ill-formed runs stay."""
    return _ETHIOPIC_RUN.sub(lambda run: _ethiopic(run[0]), text)


def chinese_value(text: str) -> int | None:
    """Return the value of an answer that is one Chinese or Japanese numeral, perhaps with a common counter.

    Args:
        text: the whole answer, without spaces; ``十八``, ``二〇二四`` and ``三百零五元`` have a value, ``一百五`` is
            ambiguous and ``三角形`` is a word: both have none.
    """
    text = text.translate(_CHINESE_VARIANTS)
    numeral = re.match(rf"(?:{_D}|[零十百千万亿])*", text)
    assert numeral is not None
    if not numeral[0] or text[numeral.end() :] not in _CHINESE_COUNTED:
        return None
    if _CHINESE_POSITIONAL.fullmatch(numeral[0]):
        return int("".join(str(_CHINESE_DIGITS[digit]) for digit in numeral[0]))
    total, rest = 0, numeral[0]
    for unit, factor in (("亿", 10**8), ("万", 10**4)):
        head, found, tail = rest.partition(unit)
        if not found:
            continue
        value = _section(head)
        # 一万五 is 15,000 in speech, like 一百五.
        if not value or re.fullmatch(_D, tail):
            return None
        total, rest = total + value * factor, tail
    value = _section(rest) if rest else 0
    if value is None:
        return None
    return total + value


def _section(text: str) -> int | None:
    match = _SECTION.fullmatch(text)
    if match is None or not text:
        return None
    thousands, hundreds, tens, unit = match.groups()
    above = hundreds is not None or thousands is not None
    if unit and above and tens is None and text[-2] != "零":
        return None
    if text.endswith("零") and text != "零":
        return None
    total = 0
    for digit, factor in ((thousands, 1000), (hundreds, 100), (tens, 10)):
        if digit is not None:
            total += (_CHINESE_DIGITS[digit] if digit else 1) * factor
    return total + (_CHINESE_DIGITS[unit] if unit else 0)


def _ethiopic(run: str) -> str:
    if _ETHIOPIC_FORM.fullmatch(run) is None:
        return run
    total = hundreds = small = 0
    for numeral in run:
        if numeral == _ETHIOPIC_HUNDRED:
            hundreds, small = 100 * (small or 1), 0
        elif numeral == _ETHIOPIC_MYRIAD:
            total, hundreds, small = 10_000 * ((total + hundreds + small) or 1), 0, 0
        else:
            small += _ETHIOPIC_UNITS.get(numeral, 0) or _ETHIOPIC_TENS[numeral]
    return str(total + hundreds + small)
