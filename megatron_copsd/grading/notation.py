"""One plain notation for signs, digits and LaTeX of all kinds, and what in a text only speaks of its other parts."""

from __future__ import annotations

import re
import unicodedata

from megatron_copsd.grading.numerals import fold_ethiopic

_CATEGORY = {code: unicodedata.category(chr(code)) for code in range(0x20000)}  # the planes that hold scripts
_FOLDED: dict[int, str | None] = {
    code: str(unicodedata.decimal(chr(code))) for code, kind in _CATEGORY.items() if kind == "Nd"
}
_FOLDED |= {code: None for code, kind in _CATEGORY.items() if kind == "Cf"}  # joiners and direction marks
_FOLDED |= {code: " " for code, kind in _CATEGORY.items() if kind in ("Zs", "Cc") and code != ord("\n")}
_FOLDED |= dict.fromkeys(map(ord, "\u2212\u2010\u2011\u2012\u2013"), "-")
CURRENCY = "".join(re.escape(chr(code)) for code, kind in _CATEGORY.items() if kind == "Sc")
_FOLDED |= dict.fromkeys(map(ord, "’‘ʼ"), "'")
_FOLDED |= {ord("٫"): ".", ord("٬"): ",", ord("،"): ",", ord("⁄"): "/"}
_FOLDED |= {ord("≈"): "=", ord("·"): "×", ord("⋅"): "×", ord("`"): " "}
# NFKC would glue these to the digits in front of them: 2½ is not 21/2, 10³ is not 103.
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")
_HTML_HIGH, _HTML_LOW = re.compile(r"<sup>\s*([^<>]{0,9})</sup>"), re.compile(r"<sub>\s*([^<>]{0,9})</sub>")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴-⁹⁺⁻]+")

# The one dash that is nothing but a minus: it stays with its number, whatever space is between.
_MINUS = re.compile("\u2212\\s*(?=\\S)")
_CIRCLED = re.compile("[①-⓿❶-➓]")  # they count steps; NFKC would make plain numbers of them

_TEX_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt|normal)|[fhm]box|underline|operatorname|boxed|emph|bm"
    r"|boldsymbol|pmb|ensuremath)\s*\{([^{}]*)\}"
)
# A brace behind a command, a power or another brace encloses an argument; {1,2} may be a set.
_TEX_GROUP = re.compile(r"\{(?!\s*\d+\s*,\s*\d{1,2}\s*\})([^{}]*)\}")
_TEX_COLOUR = re.compile(
    r"\\(?:text)?color(?:\[[^\[\]{}]*\])?\s*\{[^{}]*\}|\\colorbox\s*\{[^{}]*\}|\\fcolorbox\s*\{[^{}]*\}\s*\{[^{}]*\}"
)
_TEX_UNSEEN = re.compile(
    r"\\(?:tag|label|(?:eq)?ref|cite|footnote|[hv]space|phantom)\*?\s*\{[^{}]*\}|\\footnotemark(?:\[\d*\])?"
    r"|\\(?:bf|it|rm|tiny|small|large|Large|LARGE|huge|Huge|bfseries|displaystyle|quad|qquad|left|right)(?![A-Za-z])"
)
_TEX_REPLACEMENTS = (
    (re.compile(r"\\!|(?<=\d)\{\}(?=\d)"), ""),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b"), "°"),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "×"),
    (re.compile(r"\\approx(?![A-Za-z])"), "="),
    (re.compile(r"\\[()\[\]]"), "$"),
    (re.compile(r"\\[,;:> ]|~"), " "),
    (re.compile(r"\\([$%&#_])"), r"\1"),
    (re.compile(r"\\(?:pounds|euro|yen)(?![A-Za-z])(?:\{\})?"), "$"),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r" \1/\2 "),
    (re.compile(r"\\frac\s*\{\s*([\d.,]+)\s*\}\s*\{\s*-([\d.,]+)\s*\}"), r" -\1/\2 "),
    (re.compile(r"\\frac\s*\{\s*(-?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}"), r" \1/\2 "),
)

# What numbers the parts of a solution, with what stands between the word and its number. Where a language says "3
# steps" with the number behind the noun, only its "third step" is one.
_PARTS = (
    "steps?|equations?|eqs?|formulas?|lines?|figures?|fig|tables?|sections?|methods?|cases?|options?|examples?"
    "|footnotes?|notes?|schritt|gleichung|zeile|abschnitt|beispiel|étape|équation|ligne|exemple|paso|ecuación|línea"
    "|ejemplo|шаг[аеу]?|уравнени[еяю]|пример[ае]?|hatua ya|mfano wa|mlinganyo wa|intambwe ya|etambe ya|mataki na"
    "|nzọụkwụ nke|mohato oa|isinyathelo s?esi|inyathelo l?esi|danho rechi|ደረጃ|ধাপ|దశ"
)
_UNSPACED_PARTS = "ขั้นตอนที่|ขั้นที่|สมการที่|步骤|式|公式|ステップ|手順"
_REFERENCE = re.compile(
    rf"(?i:(?<![^\W\d_])(?:{unicodedata.normalize('NFKC', _PARTS)})|{unicodedata.normalize('NFKC', _UNSPACED_PARTS)})"
    r"[\s.#(№$-]{0,3}\d+(?:\.\d+)*\)?(?:(?:-|\s*(?:&|and|und|et|y|и|na)\s*)\d+(?![.,]?\d))*"
)
_FOOTNOTE = re.compile(r"(?<!10)\^\{?1\}?(?![\d.])")
_BRACKETED = re.compile(r"\(([^()\n]{0,200})\)|\[([^\[\]\n]{0,200})\]")
_ONE_NUMBER = re.compile(rf"\s*[-+]?[\s{CURRENCY}]*\d[\d.,]*\s*[%°{CURRENCY}]?\s*[^\W\d_]*\.?\s*")
_COUNTED = re.compile(rf"\d[%°{CURRENCY}]?(?:\s+[^\W\d_]+[.,]?){{0,2}}\s*$")
_SENTENCES = re.compile(r"[.!?。।።]\s|\n")
_WORD = re.compile(r"[^\W\d_]{2}")


def fold(text: str) -> str:
    """Rewrite text in one plain notation: ASCII digits and signs, no joiners, LaTeX wrappers and spacing resolved."""
    text = _HTML_LOW.sub(r"\1", _HTML_HIGH.sub(r"^{\1}", text))
    text = _VULGAR.sub(lambda match: f" {unicodedata.normalize('NFKC', match[0])} ", text)
    text = _SUPERSCRIPT.sub(lambda match: f"^{{{match[0]}}}", text)
    text = _CIRCLED.sub(" ", _MINUS.sub("-", text))
    text = unicodedata.normalize("NFKC", text).translate(_FOLDED).replace("{,}", ",").replace("{.}", ".")
    for _ in range(8):  # wrappers inside wrappers; deeper nesting is no answer
        unwrapped = _TEX_WRAPPER.sub(r" \1 ", _TEX_UNSEEN.sub(" ", _TEX_COLOUR.sub("", text)))
        unwrapped = _TEX_GROUP.sub(_open_group, unwrapped)
        if unwrapped == text:
            break
        text = unwrapped
    for pattern, replacement in _TEX_REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return fold_ethiopic(text)


def _open_group(group: re.Match[str]) -> str:
    before = group.string[max(0, group.start() - 8) : group.start()].rstrip()[-1:]
    return group[0] if before.isalnum() or before in tuple("\\}]^_") else f" {group[1]} "


def without_asides(text: str) -> str:
    """Leave out of a folded text what refers to other parts of it, or says more about a number beside it.

    References to steps, equations and the like, a footnote's mark (``18¹``, ``18 [1]``), and a bracket with a number
    and words where its sentence has a number already: ``18 (see 3 above)``. A bracket that holds one number alone
    goes only right behind another, so that ``eighteen (18)`` keeps its number.
    """
    return _BRACKETED.sub(_aside, _FOOTNOTE.sub("", _REFERENCE.sub(" ", text)))


def _aside(bracket: re.Match[str]) -> str:
    inside = bracket[1] if bracket[1] is not None else bracket[2]
    if not any(map(str.isdigit, inside)):
        return bracket[0]
    before = _SENTENCES.split(bracket.string[max(0, bracket.start() - 200) : bracket.start()])[-1]
    if _ONE_NUMBER.fullmatch(inside):
        drop = _COUNTED.search(before) is not None
    else:
        drop = any(map(str.isdigit, before)) and _WORD.search(inside) is not None
    return " " if drop else bracket[0]
