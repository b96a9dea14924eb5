"""Models of the NLLB family through transformers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_copsd.config.sections.sdrrl import TranslatorSettings
from megatron_copsd.errors import UserError, describe
from megatron_copsd.languages import Language

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FLORES = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
_PATH = "sdrrl.translator.path"


class NllbLines:
    """Beam search, everything else as the model's folder says; implements ``Lines``."""

    def __init__(self, settings: TranslatorSettings, device: str) -> None:
        """Load the model.

        Raises:
            UserError: it can't be loaded, or is of another form.
        """
        from transformers import AutoModelForSeq2SeqLM

        self._settings = settings
        self._tokenizer = nllb_tokenizer(settings.path)
        try:
            model = AutoModelForSeq2SeqLM.from_pretrained(settings.path, use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            raise _unreadable(settings.path, error) from error
        self._model = model.to(device).eval()

    def lines(self, lines: Sequence[str], source: Language, target: Language) -> list[str | None]:
        """See ``Lines``; None for one that does not end, or to which the model says nothing."""
        self._tokenizer.src_lang = flores_token(self._tokenizer, self._settings.path, source)
        first = flores_token(self._tokenizer, self._settings.path, target)
        first_id = self._tokenizer.convert_tokens_to_ids(first)
        size = self._settings.batch_size
        return [
            text for start in range(0, len(lines), size) for text in self._batch(lines[start : start + size], first_id)
        ]

    def _batch(self, lines: Sequence[str], first_id: int) -> list[str | None]:
        import torch

        inputs = self._tokenizer(list(lines), return_tensors="pt", padding=True).to(self._model.device)
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


def nllb_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer of the NLLB family.

    Raises:
        UserError: it can't be loaded, or is of another family.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error
    if not hasattr(tokenizer, "src_lang"):
        rule = f"its tokenizer ({type(tokenizer).__name__}) takes no source language"
        raise UserError(describe(_PATH, path, rule, "Give a model of the NLLB family."))
    return tokenizer


def flores_token(tokenizer: PreTrainedTokenizerBase, path: str, language: Language) -> str:
    """Return the token that stands for a language.

    Raises:
        UserError: the model has none.
    """
    codes = [alias for alias in language.aliases if _FLORES.fullmatch(alias)]
    known = tokenizer.get_vocab()
    for code in codes:
        if code in known:
            return code
    rule = f"{path} has no token of {language.name} ({', '.join(codes) or 'no FLORES code'})"
    raise UserError(describe("sdrrl.targets", language.code, rule, "Use another translator for it."))


def _unreadable(path: str, error: Exception) -> UserError:
    rule = f"no translation model can be loaded from there ({str(error).splitlines()[0][:200]})"
    remedy = "Give an HF folder or hub name of the NLLB family, such as facebook/nllb-200-distilled-600M (2.5 GB)."
    return UserError(describe(_PATH, path, rule, remedy))
