"""The questions about a corpus: table 1 of the paper (arXiv 2402.12204), whose italics are not part of the text."""

from __future__ import annotations

from megatron_copsd.languages import Language
from megatron_copsd.sdrrl.chance import uniform


def translation_question(text: str, source: Language, target: Language) -> str:
    """Return the question of ``mt``, whose answer is the translation."""
    return (
        f"Question: Translate the following sentence from {source.name} to {target.name}.\n"
        f"{text}\n"
        "Answer:"
    )  # fmt: skip


def completion_question(sentence: str, target: Language, *names: object) -> str | None:
    """Return the question of ``comp``, whose answer is the whole sentence; None for one that can't be cut.

    Args:
        sentence: in the target language.
        target: its language.
        names: of the random place at which it is cut: between words, or between characters where there is one word.
    """
    words = sentence.split(" ")
    joiner, parts = (" ", words) if len(words) > 1 else ("", list(sentence))
    if len(parts) < 2:
        return None
    kept = 1 + int(uniform(*names) * (len(parts) - 1))
    return (
        f"Question: Complete the following sentence in {target.name} according to its context.\n"
        f"{joiner.join(parts[:kept])}\n"
        "Answer:"
    )
