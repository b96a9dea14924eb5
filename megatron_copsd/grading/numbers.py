"""Reading a short answer as one plain number, exactly, whatever its script, separators, currency and units.

Expressions (roots, variables, several numbers) have no value here; see ``readings`` for the rules.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from megatron_copsd.grading.notation import CURRENCY, fold, without_asides
from megatron_copsd.grading.numerals import chinese_value

_MAX_LENGTH = 300
_MAX_EXPONENT = 100

RUN = r"(?:\d{1,3}(?:\ \d{3})+(?!\d)(?:[.,]\d+)?|\d+(?:[.,']\d+)*|(?<![^\W\d_])\.\d+)"
NUMBER = re.compile(
    rf"(?P<whole>\d+)\ +(?P<over>[1-9]\d*)/(?P<under>[1-9]\d*)"
    rf"|(?P<numerator>{RUN})\ */\ *(?P<denominator>{RUN})"
    rf"|10\ ?\^\ ?\{{?(?P<power>[-+]?\d+)\}}?"
    rf"|(?P<run>{RUN})(?:\ ?×\ ?10\ ?\^\ ?\{{?(?P<times>[-+]?\d+)\}}?|[eE](?P<exponent>[-+]?\d+)(?!\w))?"
)
_SIGNED_PREFIX = re.compile(rf"(?s)(?P<rest>.*?)(?P<sign>[-+]?)(?P<gap>[\s{CURRENCY}]*)")
_LIST = re.compile(r"\d+,(?!\d{3}$)\d+")

# Number words that scale the digits beside them; in a language that is not here such a word reads as a unit.
_SCALES = {
    100: "hundred 百",
    1_000: "thousand thousands tausend mille mil elfu тысяча тысячи тысяч হাজার వేల వేలు వెయ్యి พัน 千",
    10_000: "หมื่น 万 萬",
    100_000: "lakh lakhs laki লাখ লক্ষ లక్ష లక్షల లక్షలు แสน",
    1_000_000: "million millions millionen millón millones milioni миллион миллиона миллионов మిలియన్ ล้าน",
    10_000_000: "crore crores কোটি కోటి కోట్ల కోట్లు",
    100_000_000: "亿 億",
    1_000_000_000: "billion billions milliarde milliarden milliard milliards bilioni миллиард миллиарда миллиардов",
}
_SCALE_OF = {word: factor for factor, words in _SCALES.items() for word in unicodedata.normalize("NFKC", words).split()}
_UNSPACED = tuple(word for word in _SCALE_OF if re.match("[\u0e00-\u0e7f\u3400-\u9fff]", word))
_SCALES_IN_FRONT = ("elfu", "laki", "milioni", "bilioni")

_WORD = re.compile(r"\s*([^\s\d.,;:!?()/\"-]+)")
_LAST_WORD = re.compile(r"([^\s\d.,;:!?()/\"-]+)\s*$")
_UNIT_POWER = re.compile(r"(?<=[^\W\d_])\ *\^\ *\{?-?[1-9]\}?|(?<=[ckd]m)[23](?!\w)|(?<=[\d ]m)[23](?!\w)")
_LATIN = r"A-Za-z\u00c0-\u024f\u0370-\u03ff"
_LONE_LETTER = re.compile(rf"(?<![^\W\d_'])[{_LATIN}](?![^\W\d_'])")
_ATTACHED = re.compile(rf"[{_LATIN}]{{1,2}}(?![^\W\d_])")
_TEX_FACTOR = re.compile(r"\s*\\(?:pi|sqrt)(?![A-Za-z])")
# A letter or two right behind a number may be a product, as in 5x or 2ab, unless they are one of these.
_UNITS = (
    "m g s l h t d p c L C F W V A J kg km cm mm dm ml mL cl dl mg lb oz ft in yd mi hr am pm st nd rd th ha "
    "GB MB TB KB kB Gb Mb Kb kW Hz kr Kč zł Ft Tk Rs Br sh"
)
_ATTACHED_UNITS = frozenset(_UNITS.split())
_LONE_WORDS = frozenset("aàeoiuAÀEOIURNKP") | _ATTACHED_UNITS  # words and currency letters; never x, y, z, n, k


def readings(text: str) -> tuple[Fraction, ...]:
    """Return the values a short answer can mean, the likeliest first; empty where it is not one plain number.

    A plain number may carry words, units, a percent or currency sign and markup on either side, and may be the right
    side of an equation: ``x = -1,250.5``, ``Jibu: \\$18``, ``18\\text{ dola}``, ``২৭৬,০০০ টাকা``. Rules:

    * Digits of every Unicode decimal script, and well-formed Ethiopic and Chinese numerals.
    * Groups of three set off by comma, dot, apostrophe or any space, or Indian groups (1,00,000); with two kinds of
      separator, the last one is the decimal sign.
    * One comma before three digits groups, one dot is the decimal sign, unless the three digits after the dot are all
      zero; the other meaning is the second reading. So ``1,000`` is 1000, ``1.000`` is 1000 or 1, ``2.125`` is 2.125
      or 2125.
    * ``a/b``, mixed ``2 1/2``, LaTeX fractions, ``1.8e3`` and ``1.8 \\times 10^{3}``.
    * ``%`` is a unit: 18 % is 18.
    * What refers to something else is left out: ``18 (see step 3)``, ``18 [1]``, ``18¹``.
    * A number word right behind the digits (million, lakh, 万, elfu ...) scales them; a number in words alone, a root,
      a variable, a range or a list has no value.
    """
    folded = fold(text).replace("\n", " ").strip()
    if len(folded) > _MAX_LENGTH:
        return ()
    side = _right_side(folded)
    if not any(char.isdigit() for char in side):
        value = chinese_value(re.sub(rf"[\s.。{CURRENCY}]", "", side))
        return () if value is None else (Fraction(value),)
    return _plain(without_unit_powers(without_asides(side)))


def _right_side(text: str) -> str:
    """Return the side of an equation that states the result, or nothing where the text states several."""
    if "=" not in text:
        return text
    sides = text.split("=")
    numeric = [i for i, side in enumerate(sides) if any(char.isdigit() for char in side)]
    last = numeric[-1] if numeric else len(sides) - 1
    another_variable = any(re.search(r"\d.*(?<!\w)[A-Za-z]\s*$", side) for side in sides[1:last])
    return "" if another_variable or re.search("[<>!]=", text) else sides[last].strip()


def _plain(text: str) -> tuple[Fraction, ...]:
    number = NUMBER.search(text)
    if number is None:
        return ()
    prefix = _SIGNED_PREFIX.fullmatch(text[: number.start()])
    assert prefix is not None
    rest, sign, gap = prefix["rest"], prefix["sign"], prefix["gap"]
    in_words = any(char.isalpha() for char in rest)
    if sign == "+" and in_words:
        return ()
    scale, suffix = read_scale(text[number.end() :])
    front = _LAST_WORD.search(rest)
    if front and front[1].casefold() in _SCALES_IN_FRONT:
        scale *= _SCALE_OF[front[1].casefold()]
    if not _is_prose(rest) or not _is_prose(suffix) or suffix.startswith("!"):
        return ()
    if is_coefficient(suffix):
        return ()
    if rest.rstrip().endswith(("(", "[")) and _LIST.fullmatch(number[0]):
        return ()
    # Behind words, "- 18" is a dash and "item-18" a hyphen; "Jibu:-18" sets the number off.
    apart = in_words and any(map(str.isspace, gap))
    negative = sign == "-" and not apart and not rest[-1:].isalpha() and not rest.endswith(":")
    return tuple((-value if negative else value) * scale for value in _values(number))


def is_coefficient(suffix: str, most_letters: int = 2) -> bool:
    """Whether a number with this behind it is a factor of it, as in 5x or 5π: so many letters, and no unit."""
    attached = _ATTACHED.match(suffix)
    if attached and len(attached[0]) <= most_letters and attached[0] not in _ATTACHED_UNITS:
        return True
    return _TEX_FACTOR.match(suffix) is not None


def without_unit_powers(text: str) -> str:
    """Leave out the powers of units: cm², m^{-2}, km2."""
    return _UNIT_POWER.sub("", text)


def _is_prose(text: str) -> bool:
    """Whether text around a number is words and punctuation alone, not part of an expression."""
    if any(letter not in _LONE_WORDS for letter in _LONE_LETTER.findall(text)):
        return False
    kinds = ((char, unicodedata.category(char)) for char in text)
    return all((kind[0] in "LMZP" or kind == "Sc" or char == "°") and char not in "\\_{}‰‱" for char, kind in kinds)


def read_scale(suffix: str) -> tuple[int, str]:
    """Return the factor of the number words at the start of a suffix, and the suffix without them."""
    factor = 1
    while word := _WORD.match(suffix):
        name = word[1].casefold()
        unspaced = next((scale for scale in _UNSPACED if name.startswith(scale)), None)
        if name not in _SCALE_OF and unspaced is None:
            break
        factor *= _SCALE_OF[unspaced or name]
        suffix = suffix[word.start(1) + len(unspaced or name) :]
    return factor, suffix


def _values(number: re.Match[str]) -> tuple[Fraction, ...]:
    if number["whole"]:
        part = Fraction(int(number["over"]), int(number["under"]))
        return (int(number["whole"]) + part,) if part < 1 else ()
    if number["numerator"]:
        over, under = _run_readings(number["numerator"]), _run_readings(number["denominator"])
        return (over[0] / under[0],) if over and under and under[0] else ()
    exponent = int(number["power"] or number["times"] or number["exponent"] or 0)
    if abs(exponent) > _MAX_EXPONENT:
        return ()
    values = (Fraction(1),) if number["power"] else _run_readings(number["run"])
    return tuple(value * Fraction(10) ** exponent for value in values)


def _run_readings(run: str) -> tuple[Fraction, ...]:
    """Return what digits with separators can mean, the likeliest first."""
    parts, separators = re.split(r"\D", run), re.findall(r"\D", run)
    if not separators:
        return (Fraction(int(run)),)
    decimal = Fraction(int("".join(parts)), 10 ** len(parts[-1]))
    last_is_decimal = separators[-1] in ",." and separators.count(separators[-1]) == 1
    if len(set(separators)) > 1:
        groups_well = len(set(separators[:-1])) == 1 and _are_groups(parts[:-1])
        return (decimal,) if last_is_decimal and groups_well else ()
    if not _are_groups(parts):
        return (decimal,) if last_is_decimal else ()
    grouped = Fraction(int("".join(parts)))
    if not last_is_decimal:
        return (grouped,)
    zeros = int(parts[-1]) == 0
    if separators[0] == ",":
        return (grouped,) if zeros else (grouped, decimal)
    return (grouped, decimal) if zeros else (decimal, grouped)


def _are_groups(parts: list[str]) -> bool:
    """Whether digit groups are thousands (1 000 000) or Indian (10 00 000)."""
    first, *middle, last = parts
    if not 1 <= len(first) <= 3 or first.startswith("0") or len(last) != 3:
        return False
    return all(len(part) == 3 for part in middle) or (len(first) < 3 and all(len(part) == 2 for part in middle))
