"""The model that is trained translates by itself, which the paper leaves for the future."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_copsd.languages import Language
from megatron_copsd.sdrrl.respond import Responder
from megatron_copsd.sdrrl.templates import translation_question


class OwnTranslator:
    """Asks with the question of the subset mt; implements ``Translator``."""

    def __init__(self, responder: Responder, max_tokens: int) -> None:
        self._responder, self._max_tokens = responder, max_tokens

    def translate(self, texts: Sequence[str], source: Language, target: Language) -> list[str]:
        """See ``Translator``; greedy, so that the same text has the same translation. One that does not end is none."""
        questions = [translation_question(text, source, target) for text in texts]
        answers = self._responder.answer_verbatim(questions, source, self._max_tokens)
        return [answer.text if answer.ended else "" for answer in answers]
