"""Translation quality of parallel files such as FLORES: BLEU and chrF++ as SacreBLEU computes them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import sacrebleu
from sacrebleu.tokenizers.tokenizer_spm import SPM_MODELS

from megatron_copsd.config.paths import why_no_file
from megatron_copsd.errors import UserError, describe

TOKENIZERS = ("13a", "intl", "char", "zh", "ja-mecab", "none", "flores101", "flores200")
_WITHOUT_MODEL = "13a (European languages), intl or char"


@dataclass(frozen=True)
class TranslationReport:
    """Corpus scores of one file of translations; report them with their signatures.

    Attributes:
        sentences: number of sentence pairs.
        empty: translations that are empty; they count.
        bleu: 0 to 100.
        chrf: chrF++ (character 6-grams and word 2-grams), 0 to 100.
        bleu_signature, chrf_signature: SacreBLEU's record of every setting and its version.
    """

    sentences: int
    empty: int
    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str

    def numbers(self) -> dict[str, object]:
        """Return what metrics files hold."""
        return {
            "sentences": self.sentences,
            "empty": self.empty,
            "bleu": self.bleu,
            "bleu_signature": self.bleu_signature,
            "chrf++": self.chrf,
            "chrf++_signature": self.chrf_signature,
        }

    def summary(self) -> str:
        """Return the scores with their signatures, for people."""
        scores = f"BLEU {self.bleu:.2f}  {self.bleu_signature}\nchrF++ {self.chrf:.2f}  {self.chrf_signature}"
        return f"{scores}\n{self.sentences} sentences, {self.empty} without a translation"


def score_translation(hypotheses: Path, references: Path, *, tokenizer: str = "13a") -> TranslationReport:
    """Score a file of translations against a file of references, line by line.

    Args:
        hypotheses: UTF-8 text, one translation a line; a line may be empty.
        references: UTF-8 text, one reference a line, or tab-separated with the reference in the last column.
        tokenizer: SacreBLEU's, for BLEU; ``flores200`` is spBLEU, in which FLORES scores are reported.

    Raises:
        UserError: a file is missing, empty or not UTF-8, the files differ in length, a reference is missing, a line
            has other columns than the first or a hypothesis has several, or the tokenizer is unknown or needs a model
            or a package that is not on this machine.
    """
    _require_tokenizer(tokenizer)
    ours, theirs = _hypotheses(hypotheses), _references(references)
    if len(ours) != len(theirs):
        rule = f"has {len(ours)} lines and {references} has {len(theirs)}"
        where = f"{hypotheses}:{min(len(ours), len(theirs)) + 1}"
        raise UserError(describe(where, len(ours), rule, "Give one hypothesis a reference, in order."))
    bleu = sacrebleu.BLEU(tokenize=tokenizer)
    chrf = sacrebleu.CHRF(word_order=2)
    return TranslationReport(
        sentences=len(theirs),
        empty=sum(not line for line in ours),
        bleu=bleu.corpus_score(ours, [theirs]).score,
        chrf=chrf.corpus_score(ours, [theirs]).score,
        bleu_signature=str(bleu.get_signature()),
        chrf_signature=str(chrf.get_signature()),
    )


def _hypotheses(path: Path) -> list[str]:
    lines = _lines(path)
    for number, line in enumerate(lines, start=1):
        if "\t" in line:
            rule = "a tab, and hypotheses are one sentence a line"
            raise UserError(describe(f"{path}:{number}", line[:80], rule, "Leave the source column out."))
    return lines


def _references(path: Path) -> list[str]:
    rows = [line.split("\t") for line in _lines(path)]
    for number, row in enumerate(rows, start=1):
        where = f"{path}:{number}"
        if not row[-1].strip():
            raise UserError(describe(where, "\t".join(row), "empty reference", "Remove the pair from both files."))
        if len(row) != len(rows[0]):
            rule = f"the line has {len(row)} tab-separated columns, the first one has {len(rows[0])}"
            raise UserError(describe(where, "\t".join(row)[:80], rule, "Check the tabs."))
    return [row[-1].strip() for row in rows]


def _lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file, stripped of spaces and carriage returns."""
    if rule := why_no_file(path):
        raise UserError(describe(str(path), path.name, rule, "Give a text file."))
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, wrong = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start : error.end]
        raise UserError(describe(f"{path}:{line}", wrong, "not UTF-8", "Save it as UTF-8.")) from None
    if not text.strip():
        raise UserError(describe(f"{path}:1", path.name, "the file is empty", "Give one sentence a line."))
    # Not splitlines: U+2028, form feeds and the like stand inside sentences and would shift all lines below.
    return [line.strip(" \r") for line in text.removesuffix("\n").split("\n")]


def _require_tokenizer(tokenizer: str) -> None:
    """Refuse a tokenizer that lacks a package or that SacreBLEU would download a model for; never use another one."""
    if tokenizer not in TOKENIZERS:
        remedy = f"Use one of {', '.join(TOKENIZERS)}."
        raise UserError(describe("--tokenizer", tokenizer, "SacreBLEU tokenizer not offered here", remedy))
    if tokenizer == "ja-mecab" and not all(map(importlib.util.find_spec, ("MeCab", "ipadic"))):
        remedy = "Run pip install 'sacrebleu[ja]', or use char."
        raise UserError(describe("--tokenizer", tokenizer, "needs the packages MeCab and ipadic", remedy))
    if tokenizer not in SPM_MODELS:
        return
    model = Path(sacrebleu.SACREBLEU_DIR) / "models" / Path(SPM_MODELS[tokenizer]["url"]).name
    if not model.is_file():
        source = SPM_MODELS[tokenizer]["url"]
        remedy = f"Download {source} to {model} (or set SACREBLEU), or use {_WITHOUT_MODEL}."
        raise UserError(describe("--tokenizer", tokenizer, "its model is not on this machine", remedy))
    if importlib.util.find_spec("sentencepiece") is None:
        remedy = f"Install sentencepiece, or use {_WITHOUT_MODEL}."
        raise UserError(describe("--tokenizer", tokenizer, "needs the package sentencepiece", remedy))
