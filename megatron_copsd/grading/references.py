"""Which reference answers a response can be graded against."""

from __future__ import annotations

import re

from megatron_copsd.grading.answers import answer_key
from megatron_copsd.grading.numbers import readings

LONGEST = 300
"""Characters of an answer, beyond which it is never read as a number."""

# What other programs write where there is no value.
_NO_VALUE = {"nan", "inf", "infinity", "none", "null", "n/a", "<na>"}
_WITH_EXPONENT = re.compile(r"[-+]?[\d.,]+[eE][-+]?\d+")


def ungradable(answer: str | None) -> str | None:
    """Return why no response could be right by this answer; None where one can."""
    if answer is None or not answer.strip():
        return "there is no answer"
    text = answer.strip()
    if len(text) > LONGEST:
        return f"the answer has more than {LONGEST} characters"
    if text.lstrip("+-").casefold() in _NO_VALUE:
        return "the answer stands for none"
    if _WITH_EXPONENT.fullmatch(text) and not readings(text):
        return "the answer is a number too large or too small to be read"
    return None if answer_key(text) else "the answer has neither digits nor letters"
