"""One row of the table of languages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """One language and the short texts of its prompts.

    Attributes:
        code: the upper-case code used in settings and data.
        name: English name.
        native_name: the language's name for itself.
        script: ISO 15924 code of the script the texts and problems are written in.
        aliases: other codes that mean this language and no other (ISO 639-1, 639-3, FLORES).
        problem_label: word in front of a problem.
        solution_label: word in front of a solution.
        instruction: asks for step-by-step reasoning in the language and the final answer in ``\\boxed{}``.
        think_prefix: opening sentence of a thinking block.
        transition: tells the teacher, who has seen the English solution, to solve the problem anew in the language.
        checked: whether a speaker has checked the texts.
        texts_language: code of the language the texts are written in where that is not ``code``.
    """

    code: str
    name: str
    native_name: str
    script: str
    aliases: tuple[str, ...]
    problem_label: str
    solution_label: str
    instruction: str
    think_prefix: str
    transition: str
    checked: bool = False
    texts_language: str | None = None

    @property
    def caveat(self) -> str | None:
        """What a user of these texts must know, or None where a speaker has checked them."""
        if self.texts_language is not None:
            return f"the prompt texts of {self.code} are written in {self.texts_language}, not in {self.name}"
        if not self.checked:
            return f"no speaker of {self.name} has checked the prompt texts of {self.code}"
        return None
