"""Translation scores through SacreBLEU."""

from __future__ import annotations

from pathlib import Path

import pytest
import sacrebleu

from megatron_copsd.errors import UserError
from megatron_copsd.eval.translation import score_translation

REFERENCES = [
    "Joho hutumia komeo mbili za buluu.",
    "Paka amekaa juu ya mkeka mkubwa.",
    "Leo ni siku nzuri sana ya kusoma.",
]
HYPOTHESES = ["Joho hutumia komeo mbili za kijani.", "Paka amekaa juu ya mkeka.", "Leo ni siku nzuri sana ya kusoma."]


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_scores_are_sacrebleus(tmp_path: Path) -> None:
    report = score_translation(write(tmp_path / "h", HYPOTHESES), write(tmp_path / "r", REFERENCES))
    assert report.bleu == pytest.approx(sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score)
    assert report.chrf == pytest.approx(sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES], word_order=2).score)
    assert 0 < report.bleu < 100
    assert "tok:13a" in report.bleu_signature
    assert "nw:2" in report.chrf_signature
    assert report.sentences == 3
    assert report.bleu_signature in report.summary()


def test_tsv_references(tmp_path: Path) -> None:
    tsv = write(tmp_path / "r.tsv", [f"source {i}\t{line}" for i, line in enumerate(REFERENCES)])
    report = score_translation(write(tmp_path / "h", REFERENCES), tsv)
    assert report.bleu == pytest.approx(100)


def test_mistakes(tmp_path: Path) -> None:
    hypotheses, references = write(tmp_path / "h", HYPOTHESES), write(tmp_path / "r", REFERENCES[:2])
    with pytest.raises(UserError, match=r"has 3 lines and .* has 2"):
        score_translation(hypotheses, references)
    with pytest.raises(UserError, match="no such file"):
        score_translation(tmp_path / "nowhere", references)
    with pytest.raises(UserError, match=r"r:2.*empty reference"):
        score_translation(hypotheses, write(tmp_path / "r", ["a", " ", "c"]))
    with pytest.raises(UserError, match="is empty"):
        score_translation(write(tmp_path / "h", []), references)
    (tmp_path / "latin").write_bytes("é\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        score_translation(tmp_path / "latin", references)
    with pytest.raises(UserError, match="--tokenizer: 'words'"):
        score_translation(hypotheses, references, tokenizer="words")
