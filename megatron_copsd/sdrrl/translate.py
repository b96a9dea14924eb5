"""Who translates: a model of the NLLB family, or the model that is trained, through its rollout engine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from megatron_copsd.config.sections.sdrrl import TranslatorSettings
from megatron_copsd.errors import UserError, describe
from megatron_copsd.languages import Language
from megatron_copsd.sdrrl.respond import Responder
from megatron_copsd.sdrrl.templates import translation_question

_FLORES = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
_LETTER = re.compile(r"[^\W\d_]")


class Translator(Protocol):
    """Translates texts; a text that it can make nothing of comes back empty, and is rejected later."""

    def translate(self, texts: Sequence[str], source: Language, target: Language) -> list[str]:
        """Return a translation of each text, in order.

        Raises:
            UserError: a language is not among those it knows.
        """
        ...


def translated(translator: Translator, texts: Sequence[str], source: Language, target: Language) -> list[str]:
    """Translate, and see that what comes back belongs to what was given.

    Raises:
        UserError: the translator gave another number of texts, or something else than texts.
    """
    found = translator.translate(texts, source, target)
    if len(found) != len(texts) or not all(isinstance(text, str) for text in found):
        rule = f"the translator gave {len(found)} results for {len(texts)} texts, or results that are no texts"
        raise UserError(describe("sdrrl.translator", type(translator).__name__, rule, "Use another translator."))
    return [text.strip() for text in found]


class NllbTranslator:
    """NLLB-200 or another model of its form, on this process's device; implements ``Translator``.

    The models were trained on sentences, so texts go line by line; lines without a letter stay as they are.
    """

    def __init__(self, settings: TranslatorSettings, device: str) -> None:
        """Load the model.

        Raises:
            UserError: it can't be loaded, or is of another form.
        """
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        self._settings = settings
        where = "sdrrl.translator.path"
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(settings.path)
            model = AutoModelForSeq2SeqLM.from_pretrained(settings.path, use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            rule = f"no translation model can be loaded from there ({str(error).splitlines()[0][:200]})"
            remedy = (
                "Give an HF folder or hub name of the NLLB family, such as facebook/nllb-200-distilled-600M (2.5 GB)."
            )
            raise UserError(describe(where, settings.path, rule, remedy)) from error
        if not hasattr(self._tokenizer, "src_lang"):
            rule = f"its tokenizer ({type(self._tokenizer).__name__}) takes no source language"
            raise UserError(describe(where, settings.path, rule, "Give a model of the NLLB family."))
        self._model = model.to(device).eval()

    def translate(self, texts: Sequence[str], source: Language, target: Language) -> list[str]:
        """See ``Translator``; beam search, everything else as the model's folder says."""
        self._tokenizer.src_lang, first = self._code(source), self._code(target)
        first_id = self._tokenizer.convert_tokens_to_ids(first)
        lines = [text.split("\n") for text in texts]
        wanted = list(dict.fromkeys(line for text in lines for line in text if _LETTER.search(line)))
        # Lines of one length side by side: less padding.
        wanted.sort(key=len)
        done: dict[str, str | None] = {}
        for start in range(0, len(wanted), self._settings.batch_size):
            batch = wanted[start : start + self._settings.batch_size]
            done |= zip(batch, self._lines(batch, first_id), strict=True)
        return [_joined([done.get(line, line) for line in text]) for text in lines]

    def _lines(self, batch: Sequence[str], first_id: int) -> list[str | None]:
        """Translate lines; None for one that does not end, or to which the model says nothing."""
        import torch

        inputs = self._tokenizer(list(batch), return_tensors="pt", padding=True).to(self._model.device)
        with torch.inference_mode():
            ids = self._model.generate(
                **inputs,
                forced_bos_token_id=first_id,
                num_beams=self._settings.beams,
                max_new_tokens=self._settings.max_tokens,
                do_sample=False,
            )
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        # The decoder begins with the token that ends a text.
        ended = (ids[:, 1:] == self._tokenizer.eos_token_id).any(dim=1).tolist()
        return [text.strip() or None if whole else None for text, whole in zip(texts, ended, strict=True)]

    def _code(self, language: Language) -> str:
        codes = [alias for alias in language.aliases if _FLORES.fullmatch(alias)]
        known = self._tokenizer.get_vocab()
        for code in codes:
            if code in known:
                return code
        rule = f"{self._settings.path} has no token of {language.name} ({', '.join(codes) or 'no FLORES code'})"
        raise UserError(describe("sdrrl.targets", language.code, rule, "Use another translator for it."))


def _joined(lines: Sequence[str | None]) -> str:
    """Return a text of lines; none where a line is missing, for a text with a hole is another text."""
    return "" if any(line is None for line in lines) else "\n".join(line for line in lines if line is not None)


class ModelTranslator:
    """The model itself, asked with the question of the subset mt; implements ``Translator``."""

    def __init__(self, responder: Responder, max_tokens: int) -> None:
        self._responder, self._max_tokens = responder, max_tokens

    def translate(self, texts: Sequence[str], source: Language, target: Language) -> list[str]:
        """See ``Translator``; greedy, so that the same text has the same translation. One that does not end is none."""
        questions = [translation_question(text, source, target) for text in texts]
        answers = self._responder.answer_verbatim(questions, source, self._max_tokens)
        return [answer.text if answer.ended else "" for answer in answers]
