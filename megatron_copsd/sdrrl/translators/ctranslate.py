"""Models of the NLLB family through CTranslate2, which is faster and takes quantised weights and several GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_copsd.config.sections.sdrrl import TranslatorSettings
from megatron_copsd.errors import UserError, describe
from megatron_copsd.languages import Language
from megatron_copsd.sdrrl.packages import package
from megatron_copsd.sdrrl.translators.nllb import flores_token, nllb_tokenizer

_CONVERT = (
    "ct2-transformers-converter --model facebook/nllb-200-3.3B --output_dir DIR --quantization int8 --copy_files "
    "tokenizer.json tokenizer_config.json makes one."
)


class CTranslateLines:
    """Beam search on every GPU there is; implements ``Lines``."""

    def __init__(self, settings: TranslatorSettings, gpus: int) -> None:
        """Load the model.

        Raises:
            UserError: the package is not installed, or the folder has no model of its form.
        """
        ctranslate2 = package("ctranslate2", "ctranslate2", "sdrrl.translator", "Or take sdrrl.translator.name: nllb.")
        self._settings = settings
        placed: dict[str, Any] = {"device": "cuda", "device_index": list(range(gpus))} if gpus else {"device": "cpu"}
        try:
            self._model = ctranslate2.Translator(settings.path, compute_type=settings.compute_type, **placed)
        except (RuntimeError, ValueError) as error:
            rule = f"no CTranslate2 model can be loaded from there ({str(error).splitlines()[0][:200]})"
            raise UserError(describe("sdrrl.translator.path", settings.path, rule, _CONVERT)) from error
        self._tokenizer = nllb_tokenizer(settings.path)

    def lines(self, lines: Sequence[str], source: Language, target: Language) -> list[str | None]:
        """See ``Lines``; None for one that does not end, or to which the model says nothing."""
        tokenizer = self._tokenizer
        tokenizer.src_lang = flores_token(tokenizer, self._settings.path, source)
        first = flores_token(tokenizer, self._settings.path, target)
        tokens = [tokenizer.convert_ids_to_tokens(tokenizer(line)["input_ids"]) for line in lines]
        found = self._model.translate_batch(
            tokens,
            target_prefix=[[first]] * len(tokens),
            beam_size=self._settings.beams,
            max_batch_size=self._settings.batch_size,
            max_decoding_length=self._settings.max_tokens,
            max_input_length=0,
            return_end_token=True,
        )
        texts: list[str | None] = []
        for result in found:
            said = result.hypotheses[0]
            text = tokenizer.decode(tokenizer.convert_tokens_to_ids(said), skip_special_tokens=True).strip()
            texts.append(text or None if said and said[-1] == tokenizer.eos_token else None)
        return texts
