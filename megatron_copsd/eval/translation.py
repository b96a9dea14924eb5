"""Translation scores of a FLORES-style parallel file, by SacreBLEU and with its signatures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sacrebleu.metrics import BLEU, CHRF

from megatron_copsd.errors import UserError, describe

# SacreBLEU fetches the sentencepiece models of the flores tokenizers at first use.
TOKENIZERS = ("13a", "intl", "char", "zh", "none", "flores101", "flores200")


@dataclass(frozen=True)
class TranslationReport:
    """Corpus scores.

    Attributes:
        sentences: number of pairs.
        bleu, chrf: BLEU and chrF++ (word order 2), 0 to 100.
        bleu_signature, chrf_signature: what SacreBLEU did, to be quoted with the numbers.
    """

    sentences: int
    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str

    def numbers(self) -> dict[str, object]:
        """Return what metrics files hold."""
        return {
            "sentences": self.sentences,
            "bleu": self.bleu,
            "bleu_signature": self.bleu_signature,
            "chrf++": self.chrf,
            "chrf++_signature": self.chrf_signature,
        }

    def summary(self) -> str:
        """Return the scores with their signatures, for people."""
        return (
            f"BLEU {self.bleu:.2f}  {self.bleu_signature}\n"
            f"chrF++ {self.chrf:.2f}  {self.chrf_signature}\n{self.sentences} sentences"
        )


def score_translation(hypotheses: Path, references: Path, *, tokenizer: str = "13a") -> TranslationReport:
    """Score translated sentences against references.

    Args:
        hypotheses: one sentence a line.
        references: one sentence a line, or TSV of source and reference.
        tokenizer: SacreBLEU's; ``flores200`` needs its model, which SacreBLEU downloads once.

    Raises:
        UserError: a file is missing, not UTF-8, has an empty line or another number of lines; or the tokenizer is
            unknown or its model can't be had.
    """
    if tokenizer not in TOKENIZERS:
        remedy = f"Use one of {', '.join(TOKENIZERS)}."
        raise UserError(describe("--tokenizer", tokenizer, "SacreBLEU tokenizer not offered here", remedy))
    ours = _lines(hypotheses, allow_empty=True)
    theirs = [line.rpartition("\t")[2] for line in _lines(references, allow_empty=False)]
    if len(ours) != len(theirs):
        rule = f"has {len(ours)} lines and {references} has {len(theirs)}"
        raise UserError(describe(str(hypotheses), len(ours), rule, "Give one hypothesis a reference, in order."))
    try:
        bleu = BLEU(tokenize=tokenizer)
        score = bleu.corpus_score(ours, [theirs]).score
    except (OSError, ImportError) as error:
        rule = f"its model could not be had ({str(error).splitlines()[0]})"
        remedy = "Run once with a network, or use --tokenizer 13a and quote its signature."
        raise UserError(describe("--tokenizer", tokenizer, rule, remedy)) from error
    chrf = CHRF(word_order=2)
    chrf_score = chrf.corpus_score(ours, [theirs]).score
    return TranslationReport(len(ours), score, chrf_score, str(bleu.get_signature()), str(chrf.get_signature()))


def _lines(path: Path, *, allow_empty: bool) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(describe(str(path), path.name, "no such file", "Give a text file.")) from None
    except UnicodeDecodeError as error:
        rule = f"not UTF-8 at byte {error.start}"
        raise UserError(describe(str(path), path.name, rule, "Save it as UTF-8.")) from None
    lines = text.split("\n")
    lines = lines[:-1] if lines and not lines[-1] else lines
    if not lines:
        raise UserError(describe(str(path), path.name, "the file is empty", "Give one sentence a line."))
    for number, line in enumerate(lines, 1):
        if not allow_empty and not line.strip():
            raise UserError(describe(f"{path}:{number}", line, "empty reference", "Remove the pair from both files."))
    return lines
