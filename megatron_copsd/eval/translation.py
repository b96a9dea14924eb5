"""Translation quality of parallel files such as FLORES: BLEU and chrF++ as SacreBLEU computes them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import sacrebleu
from sacrebleu.tokenizers.tokenizer_spm import SPM_MODELS

from megatron_copsd.errors import UserError, describe

Tokenizer = Literal["flores200", "flores101", "13a", "intl", "char", "zh"]
_OTHERS = "13a (European languages), intl or char"


@dataclass(frozen=True)
class TranslationScore:
    """Corpus scores of one file of translations; report them with their signatures.

    Attributes:
        bleu: 0 to 100.
        chrf: chrF++ (character 6-grams and word 2-grams), 0 to 100.
        bleu_signature, chrf_signature: SacreBLEU's record of every setting and its version.
        sentences: number of sentence pairs.
        empty: translations that are empty; they count, and score 0.
    """

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str
    sentences: int
    empty: int

    def summary(self) -> str:
        """Return the scores as text for people."""
        scores = f"BLEU {self.bleu:.2f} ({self.bleu_signature})\nchrF++ {self.chrf:.2f} ({self.chrf_signature})"
        return f"{scores}\n{self.sentences} sentences, {self.empty} without a translation"


def score_translations(
    hypotheses: str | Path,
    references: str | Path,
    tokenizer: Tokenizer = "flores200",
    hypothesis_column: int | None = None,
    reference_column: int | None = None,
) -> TranslationScore:
    """Score a file of translations against a file of references, line by line.

    Args:
        hypotheses: UTF-8 text, one translation a line; a line may be empty.
        references: UTF-8 text, one reference a line.
        tokenizer: SacreBLEU's tokenizer for BLEU; ``flores200`` is spBLEU, which FLORES scores are reported in.
        hypothesis_column: column of tab-separated hypotheses, from 1; None where the line is the sentence.
        reference_column: the same for the references.

    Raises:
        UserError: a file is missing, empty or not UTF-8, the files differ in length, a column or a reference is
            missing, or the tokenizer is unknown or needs a model that is not on this machine.
    """
    _require_tokenizer(tokenizer)
    hypothesis = read_sentences(hypotheses, hypothesis_column)
    reference = read_sentences(references, reference_column)
    if len(hypothesis) != len(reference):
        rule = f"has {len(hypothesis)} lines, {references} has {len(reference)}"
        raise UserError(describe("hypotheses", str(hypotheses), rule, "Give files whose i-th lines correspond."))
    for number, sentence in enumerate(reference, start=1):
        if not sentence:
            raise UserError(
                describe(f"{references}:{number}", sentence, "the reference is empty", "Fill or remove it.")
            )
    bleu = sacrebleu.BLEU(tokenize=tokenizer)
    chrf = sacrebleu.CHRF(word_order=2)
    return TranslationScore(
        bleu=bleu.corpus_score(hypothesis, [reference]).score,
        chrf=chrf.corpus_score(hypothesis, [reference]).score,
        bleu_signature=str(bleu.get_signature()),
        chrf_signature=str(chrf.get_signature()),
        sentences=len(reference),
        empty=sum(not sentence for sentence in hypothesis),
    )


def read_sentences(path: str | Path, column: int | None = None) -> list[str]:
    """Return the sentences of a UTF-8 file, one a line, stripped; ``column`` (from 1) where it is tab-separated.

    Raises:
        UserError: the file is missing, empty or not UTF-8, or a line has too few columns.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(describe("sentences", str(path), "no such file", "Give a text file.")) from None
    except UnicodeDecodeError as error:
        raise UserError(
            describe("sentences", str(path), f"not UTF-8 at byte {error.start}", "Save it as UTF-8.")
        ) from None
    # Not splitlines: U+2028, form feeds and the like stand inside sentences and would shift all lines below.
    lines = text.removesuffix("\n").split("\n")
    if not text.strip():
        raise UserError(describe("sentences", str(path), "the file is empty", "Write one sentence a line."))
    if column is None:
        return [line.strip() for line in lines]
    if column < 1:
        raise UserError(describe("column", column, "columns count from 1", "Use 1 for the first."))
    sentences = []
    for number, line in enumerate(lines, start=1):
        cells = line.split("\t")
        if len(cells) < column:
            rule = f"the line has {len(cells)} tab-separated columns, column {column} is asked for"
            raise UserError(describe(f"{path}:{number}", line[:80], rule, "Check the column and the tabs."))
        sentences.append(cells[column - 1].strip())
    return sentences


def _require_tokenizer(tokenizer: str) -> None:
    """Refuse a tokenizer that SacreBLEU would have to download a model for, rather than score with another one."""
    if tokenizer not in get_args(Tokenizer):
        known = ", ".join(get_args(Tokenizer))
        raise UserError(describe("tokenizer", tokenizer, "unknown tokenizer", f"Known: {known}."))
    if tokenizer not in SPM_MODELS:
        return
    model = Path(sacrebleu.SACREBLEU_DIR) / "models" / Path(SPM_MODELS[tokenizer]["url"]).name
    if not model.is_file():
        remedy = f"Put its SentencePiece model at {model} (or set SACREBLEU), or choose {_OTHERS}."
        raise UserError(describe("tokenizer", tokenizer, "its model is not on this machine", remedy))
    if importlib.util.find_spec("sentencepiece") is None:
        remedy = f"Install sentencepiece, or choose {_OTHERS}."
        raise UserError(describe("tokenizer", tokenizer, "needs the package sentencepiece", remedy))
