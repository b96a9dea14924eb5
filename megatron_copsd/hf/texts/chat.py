"""A tokenizer's chat template, tried once: it has to show the message, and to be the same every day."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from megatron_copsd.errors import UserError, describe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REMEDY = "Correct the model's chat_template.jinja (or chat_template in tokenizer_config.json), or set template: plain."
_BY_CHANCE = re.compile(r"\|\s*random\b|\blipsum\s*\(")
# As long as a problem with its instruction, of several paragraphs, and no word twice.
_PROBES = tuple(
    "\n\n".join(f"copsd {start + n} mangoes: {start + n} + 1 = ?" for n in range(20)) for start in (100, 900)
)


class ChatTemplate:
    """Writes a user's message as the model was trained to read it.

    Args:
        tokenizer: the model's tokenizer, whose template it is.
        date: what the template is given as ``date_string``; None: it must do without.

    Raises:
        UserError: there is no template, it is broken, leaves the message out, or depends on the day or on chance.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str | None) -> None:
        named = tokenizer.chat_template  # one, or several by name
        source = named.get("default") if isinstance(named, dict) else named
        if not source:
            raise _refusal("the tokenizer has no chat template", "Set prompt.template: plain.")
        if not isinstance(source, str):
            raise _refusal("the chat template is no text", _REMEDY)
        self._tokenizer, self._source = tokenizer, source
        self._given: dict[str, Any] = {} if date is None else {"date_string": date}
        for probe in _PROBES:
            if probe not in self.prompt(probe):
                raise _refusal("the chat template leaves the user's message out, or changes it", _REMEDY)
        if _BY_CHANCE.search(source):
            raise _refusal("the chat template chooses words by chance", _REMEDY)
        if date is not None and self.prompt(_PROBES[0]) == self._render(_PROBES[0], date_string=f"not {date}"):
            raise UserError(describe("prompt.date", date, "the chat template shows no date_string", "Remove it."))

    def prompt(self, message: str) -> str:
        """Return the conversation up to where the response begins.

        Raises:
            UserError: the template fails on this message, or asks for today's date.
        """
        try:
            # Without the function, a template that asks it for today's date fails.
            return self._render(message, strftime_now=None, **self._given)
        except Exception as error:  # templates raise what they like
            if "strftime_now" in self._source and self._renders(message):
                rule = "the chat template writes today's date, so that prompts would differ from one day to the next"
                remedy = "Write a fixed date into the model's chat_template.jinja."
                if "date_string" in self._source:
                    remedy = "Set prompt.date to the one to show, for example '26 Jul 2024'."
                raise _refusal(rule, remedy) from error
            said = (str(error).splitlines() or [""])[0]
            line = f" in line {error.lineno}" if hasattr(error, "lineno") else ""
            raise _refusal(f"the chat template fails{line} ({type(error).__name__}: {said})", _REMEDY) from error

    def _renders(self, message: str) -> bool:
        try:
            self._render(message, **self._given)
        except Exception:  # whatever it is, it is not the date
            return False
        return True

    def _render(self, message: str, **given: Any) -> str:
        turn = {"role": "user", "content": message}
        rendered = self._tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=False, **given)
        assert isinstance(rendered, str)
        return rendered


def _refusal(rule: str, remedy: str) -> UserError:
    return UserError(describe("prompt.template", "chat", rule, remedy))
