"""The student's and the teacher's prompt of a problem.

Both are made of the same parts by the same template; the teacher's has the privileged context besides. Either prompt
ends exactly where the response begins, so the same response ids can be appended to both.
"""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING, get_args

from megatron_copsd.config.schema import PromptSettings
from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.texts.chat import ChatTemplate
from megatron_copsd.languages import Language, language
from megatron_copsd.types import Problem, PromptPair, View

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENGLISH = language("EN")


class PromptBuilder:
    """Turns problems into prompt pairs with one tokenizer and one set of prompt settings.

    Args:
        tokenizer: the model's tokenizer; the ``chat`` template needs one that has a chat template.
        settings: the ``prompt`` section.

    Raises:
        UserError: the settings ask for something this tokenizer or template has not got.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: PromptSettings) -> None:
        for view in get_args(View):
            thinking, setting = settings.thinking_of(view)
            if settings.template == "plain" and thinking != "off":
                rule = "the plain template has no thinking block"
                raise UserError(describe(setting, thinking, rule, "Set it off, or prompt.template: chat."))
        self._tokenizer = tokenizer
        self._settings = settings
        self._chat = ChatTemplate(tokenizer, settings.date) if settings.template == "chat" else None
        self._plain_start = _leading_special_ids(tokenizer)

    def texts(self, problem: Problem) -> tuple[str, str]:
        """Return the student's and the teacher's prompt as text, for people, logs and tests.

        Raises:
            UserError: privileged context is asked for and the problem has none, or a text holds a special token.
        """
        return self._text(problem, "student"), self._text(problem, "teacher")

    def student_prompt(self, problem: Problem) -> tuple[int, ...] | None:
        """Return the ids of the student's prompt alone, for problems that need no privileged context (evaluation).

        Returns:
            Ids, or None where the prompt is over ``max_student_tokens`` and ``overlong`` is ``drop``.

        Raises:
            UserError: as ``pair``, for the student's part.
        """
        return self._prompt(problem, "student")

    def pair(self, problem: Problem) -> PromptPair | None:
        """Return both prompts of a problem as ids.

        Returns:
            The pair, or None where a prompt is over its limit and ``overlong`` is ``drop``; nothing is ever cut off.

        Raises:
            UserError: privileged context is asked for and the problem has none; a text holds a special token; or a
                prompt is over its limit and ``overlong`` is ``error``.
        """
        student = self._prompt(problem, "student")
        teacher = self._prompt(problem, "teacher")
        if student is None or teacher is None:
            return None
        return PromptPair(problem, student, teacher)

    def _prompt(self, problem: Problem, view: View) -> tuple[int, ...] | None:
        ids = tuple(encode(self._tokenizer, self._text(problem, view)))
        if self._settings.template == "plain":
            ids = self._plain_start + ids
        setting = f"max_{view}_tokens"
        limit = getattr(self._settings, setting)
        if len(ids) <= limit:
            return ids
        if self._settings.overlong == "drop":
            return None
        rule = f"the {view} prompt is longer than prompt.{setting} ({limit})"
        remedy = f"Raise prompt.{setting}, or set prompt.overlong: drop."
        raise UserError(describe(problem.id, f"{len(ids)} tokens", rule, remedy))

    def _text(self, problem: Problem, view: View) -> str:
        target = language(problem.language, problem.id)
        reject_special_tokens(self._tokenizer, problem.problem, problem.id)
        privileged = self._privileged(problem, target) if view == "teacher" else []
        parts = [f"{target.problem_label}: {problem.problem}", *privileged]
        if self._chat is None:
            return problem.problem if problem.verbatim else "\n".join([*parts, f"{target.solution_label}:"])
        if view == "teacher" and self._settings.include_solution:
            parts.append(target.transition)
        content = problem.problem if problem.verbatim else "\n\n".join([*parts, target.instruction])
        rendered = self._chat.prompt(content)
        if content not in rendered:
            rule = f"the tokenizer's chat template leaves out or changes the message (of {problem.id})"
            raise UserError(describe("prompt.template", "chat", rule, "Correct the template, or set plain."))
        return _with_thinking(rendered, *self._settings.thinking_of(view), target)

    def _privileged(self, problem: Problem, target: Language) -> list[str]:
        """Lines of the privileged context; an English problem is not shown to the teacher twice."""
        lines = []
        if self._settings.include_problem_en is not False and target is not _ENGLISH:
            lines.append((_ENGLISH.problem_label, problem.problem_en, "problem_en", "English problem"))
        if self._settings.include_solution:
            lines.append((_ENGLISH.solution_label, problem.solution, "solution", "English solution"))
        for _, text, field, name in lines:
            if text is None:
                rule = f"the problem has no {name}, which prompt.include_{field} shows to the teacher"
                remedy = f"Give the data an {name}, or set prompt.include_{field}: false."
                raise UserError(describe(problem.id, None, rule, remedy))
            reject_special_tokens(self._tokenizer, text, problem.id)
        return [f"{label}: {text}" for label, text, _, _ in lines]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, whole and with nothing added.

    Args:
        tokenizer: the model's tokenizer.
        text: any text; special tokens written in it are read as such, see ``reject_special_tokens``.
    """
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]


def reject_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str, where: str) -> None:
    """Refuse a text of the data that a tokenizer would read as control tokens, e.g. the end of the user's turn.

    Args:
        tokenizer: the model's tokenizer.
        text: problem or solution as the data states it.
        where: id of the problem, for the error.

    Raises:
        UserError: the text contains a special token of this tokenizer.
    """
    for token in tokenizer.all_special_tokens:
        if token in text:
            rule = "the text contains a special token of the model's tokenizer"
            raise UserError(describe(where, token, rule, "Remove it from the row, or leave the row out."))


def _leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids the tokenizer puts before a text (usually BOS or nothing); what it puts after one would end the prompt."""
    probe = tokenizer("0", add_special_tokens=True, return_special_tokens_mask=True)
    marked = zip(probe["input_ids"], probe["special_tokens_mask"], strict=True)
    return tuple(token for token, _ in takewhile(lambda pair: pair[1] == 1, marked))


def _with_thinking(rendered: str, thinking: str, setting: str, target: Language) -> str:
    """Append the thinking block to a rendered chat; one that the template has opened or closed is not repeated."""
    if thinking == "off":
        return rendered
    tail = rendered.rstrip()
    if tail.endswith("</think>"):
        if thinking == "empty":
            return rendered
        rule = "the tokenizer's chat template closes the thinking block, so none can be continued"
        raise UserError(describe(setting, thinking, rule, "Set it empty or off."))
    head = tail.removesuffix("<think>") if tail.endswith("<think>") else rendered
    return f"{head}<think>\n{target.think_prefix}" if thinking == "prefix" else f"{head}<think>\n\n</think>\n\n"
