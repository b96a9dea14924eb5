"""Who translates: real models of the NLLB family in two runtimes, and tables."""

from __future__ import annotations

from pathlib import Path

import ctranslate2.converters
import pytest
from tiny_nllb import make_nllb

from megatron_copsd.config.sections.sdrrl import MemorySettings, TranslatorSettings
from megatron_copsd.errors import UserError
from megatron_copsd.languages import language
from megatron_copsd.sdrrl.translators.ctranslate import CTranslateLines
from megatron_copsd.sdrrl.translators.memory import MemoryLines
from megatron_copsd.sdrrl.translators.nllb import NllbLines
from megatron_copsd.sdrrl.translators.translator import Lines, LineTranslator

EN, SWA, YOR = language("EN"), language("SWA"), language("YOR")
KNOWN = {"Asha has four mangoes.": "Asha ana maembe manne.", "She buys two more.": "Ananunua mawili zaidi."}
TEXTS = ["She buys two more.\nAsha has four mangoes.\n#### 18", "#### 18", "Asha has four mangoes."]
TRANSLATED = ["Ananunua mawili zaidi.\nAsha ana maembe manne.\n#### 18", "#### 18", "Asha ana maembe manne."]


@pytest.fixture(scope="module")
def nllb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nllb(tmp_path_factory.mktemp("nllb"), KNOWN, "swh_Latn")


@pytest.fixture(scope="module")
def converted(nllb: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ct2-transformers-converter does with the options that the docs give."""
    folder = tmp_path_factory.mktemp("ct2") / "model"
    files = ["tokenizer.json", "tokenizer_config.json"]
    ctranslate2.converters.TransformersConverter(str(nllb), copy_files=files).convert(str(folder), quantization="int8")
    return folder


def in_transformers(nllb: Path, max_tokens: int = 60) -> Lines:
    return NllbLines(TranslatorSettings(path=str(nllb), max_tokens=max_tokens), "cpu")


def in_ctranslate2(folder: Path, max_tokens: int = 60) -> Lines:
    return CTranslateLines(TranslatorSettings(name="ctranslate2", path=str(folder), max_tokens=max_tokens), 0)


def test_both_runtimes_translate_line_by_line(nllb: Path, converted: Path) -> None:
    for lines in (in_transformers(nllb), in_ctranslate2(converted)):
        assert LineTranslator(lines).translate(TEXTS, EN, SWA) == TRANSLATED
        with pytest.raises(UserError, match=r"sdrrl\.targets: 'YOR': .* has no token of Yoruba \(yor_Latn\)"):
            lines.lines(["Hello"], EN, YOR)


def test_a_line_that_does_not_end_leaves_no_text(nllb: Path, converted: Path) -> None:
    for lines in (in_transformers(nllb, 5), in_ctranslate2(converted, 5)):
        assert LineTranslator(lines).translate(TEXTS, EN, SWA) == ["", "#### 18", ""]


def test_folders_without_a_model(nllb: Path, converted: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sdrrl\.translator\.path: .*no CTranslate2 model.*ct2-transformers-converter"):
        in_ctranslate2(nllb)
    with pytest.raises(UserError, match=r"sdrrl\.translator\.path: .*no translation model can be loaded"):
        in_transformers(tmp_path)
    for file in converted.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 1000 if file.name == "model.bin" else None])
    with pytest.raises(UserError, match=r"sdrrl\.translator\.path: .*no CTranslate2 model"):
        in_ctranslate2(tmp_path)


def test_a_table_of_translations(tmp_path: Path) -> None:
    path = tmp_path / "en_sw.tsv"
    path.write_text("".join(f"{a}\t{b}\n" for a, b in [*KNOWN.items(), *KNOWN.items()]), encoding="utf-8")
    settings = MemorySettings(language="sw", path=str(path))
    assert LineTranslator(MemoryLines([settings])).translate([*TEXTS, "Who?"], EN, SWA) == [*TRANSLATED, ""]
    with path.open("a", encoding="utf-8") as file:
        file.write("She buys two more.\tAnanunua viwili zaidi.\n")
    with pytest.raises(UserError, match=r"en_sw\.tsv:5: 'She buys two more\.': an earlier row translates it otherwise"):
        MemoryLines([settings])
    path.write_text("Hello\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"en_sw\.tsv:1: .* 1 tab-separated columns"):
        MemoryLines([settings])
