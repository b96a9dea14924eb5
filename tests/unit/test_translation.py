"""Translation scores: SacreBLEU's own numbers and signatures, and every wrong file an error with its place."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import sacrebleu
from processes import PUBLIC_DATA

from megatron_copsd.errors import UserError
from megatron_copsd.evaluate.translation import score_translation

REFERENCES = [
    "Joho hutumia komeo mbili za buluu.",
    "Paka amekaa juu ya mkeka mkubwa.",
    "Leo ni siku nzuri sana ya kusoma.",
]
HYPOTHESES = ["Joho hutumia komeo mbili za kijani.", "Paka amekaa juu ya mkeka.", ""]

Write = Callable[[str, str | bytes | list[str]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(name: str, content: str | bytes | list[str]) -> Path:
        path = tmp_path / name
        text = "".join(f"{line}\n" for line in content) if isinstance(content, list) else content
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return path

    return _write


def test_scores_are_sacrebleus(write: Write) -> None:
    report = score_translation(write("h", HYPOTHESES), write("r", REFERENCES))
    assert report.bleu == pytest.approx(sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score)
    assert report.chrf == pytest.approx(sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES], word_order=2).score)
    assert 0 < report.bleu < 100
    assert (report.sentences, report.empty) == (3, 1)
    assert report.bleu_signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert "nw:2" in report.chrf_signature
    assert report.bleu_signature in report.summary()
    assert report.numbers()["chrf++"] == report.chrf


def test_a_perfect_translation_scores_100(write: Write) -> None:
    path = write("r", "\n".join(REFERENCES))  # no newline at the end
    report = score_translation(path, path, tokenizer="intl")
    assert (report.bleu, report.chrf) == (pytest.approx(100), pytest.approx(100))
    assert "tok:intl" in report.bleu_signature


def test_char_tokenizer_serves_scripts_without_spaces(write: Write) -> None:
    hypotheses, references = write("h", "今天天气很好\n"), write("r", "今天天气真好\n")
    assert score_translation(hypotheses, references, tokenizer="char").bleu > 0
    assert score_translation(hypotheses, references).bleu == 0


def test_references_in_the_last_column(write: Write) -> None:
    tsv = write("r.tsv", [f"{i}\tsource {i}\t{line}" for i, line in enumerate(REFERENCES)])
    assert score_translation(write("h", REFERENCES), tsv).bleu == pytest.approx(100)


def test_only_newlines_end_a_line(write: Write) -> None:
    odd = ["one\u2028still one", "two\x0c two", "three\x85three"]
    references = write("r", odd)
    assert score_translation(write("h", "\ufeff" + "\r\n".join(odd) + "\r\n"), references).chrf == pytest.approx(100)


def test_spbleu_without_its_model_is_an_error_and_nothing_else(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sacrebleu, "SACREBLEU_DIR", str(tmp_path))
    path = write("r", REFERENCES)
    with pytest.raises(UserError, match=r"--tokenizer: 'flores200': its model is not on this machine.*use 13a"):
        score_translation(path, path, tokenizer="flores200")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ("a\nb\nc\n", "a\nb\n", r"h:3: 3: has 3 lines and .*r has 2"),
        ("a\n\n", "a\n", r"h:2: 2: has 2 lines and .*r has 1"),
        ("", "a\n", r"h:1: 'h': the file is empty"),
        ("a\n", " \n \n", r"r:1: 'r': the file is empty"),
        ("a\nb\nc\n", "a\n \nc\n", r"r:2: '': empty reference"),
        ("a\nb\n", "s\ta\ns\t\n", r"r:2: .*: empty reference"),
        ("a\nb\n", "s\ta\nb\n", r"r:2: 'b': the line has 1 tab-separated columns, the first one has 2"),
        (b"\xff\xfe", "a\n", r"h:1: b'\\xff': not UTF-8"),
        (b"\xef\xbb\xbfa\nb\xe9\n", "a\nb\n", r"h:2: b'\\xe9': not UTF-8"),
        ("a\ns\tb\n", "a\nb\n", r"h:2: .*: a tab"),
    ],
)
def test_wrong_files(write: Write, hypotheses: str | bytes, references: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score_translation(write("h", hypotheses), write("r", references))


@pytest.mark.skipif(importlib.util.find_spec("MeCab") is not None, reason="MeCab is installed here")
def test_a_tokenizer_without_its_packages_is_an_error(write: Write) -> None:
    path = write("r", REFERENCES)
    with pytest.raises(UserError, match=r"--tokenizer: 'ja-mecab': needs the packages.*sacrebleu\[ja\]"):
        score_translation(path, path, tokenizer="ja-mecab")


@pytest.mark.skipif(not PUBLIC_DATA.is_dir(), reason="needs the MGSM files (COPSD_DATA)")
def test_parallel_problems_of_mgsm(write: Write) -> None:
    def questions(language: str) -> list[str]:
        lines = (PUBLIC_DATA / "mgsm" / f"mgsm_{language}.tsv").read_text(encoding="utf-8").splitlines()
        return [line.rpartition("\t")[0] for line in lines[:50]]

    english, swahili = questions("en"), questions("sw")
    references = write("r.tsv", [f"{e}\t{s}" for e, s in zip(english, swahili, strict=True)])
    assert score_translation(write("sw", swahili), references).bleu == pytest.approx(100)
    copied = score_translation(write("en", english), references)
    assert copied.sentences == 50
    assert copied.bleu < 20


def test_missing_files_and_unknown_tokenizers(write: Write, tmp_path: Path) -> None:
    path = write("r", REFERENCES)
    for wrong, rule in ((tmp_path / "nowhere", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=rule):
            score_translation(wrong, path)
    with pytest.raises(UserError, match="--tokenizer: 'words'"):
        score_translation(path, path, tokenizer="words")
