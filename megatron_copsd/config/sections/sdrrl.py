"""How the data of SDRRL and of the supervised baselines are made by ``copsd sdrrl build``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from megatron_copsd.config.paths import why_no_file
from megatron_copsd.config.settings import (
    Count,
    NonNegativeInt,
    PathText,
    PositiveInt,
    Problem,
    Settings,
    without_effect,
)
from megatron_copsd.languages import language, language_problem

if TYPE_CHECKING:
    from megatron_copsd.config.schema import Config

Share = Annotated[float, Field(ge=0, le=1)]
SubsetName = Literal["LL", "TL", "LT", "TT", "mt", "comp"]
QUESTIONS: tuple[SubsetName, ...] = ("LL", "TL", "LT", "TT")
CORPUS: tuple[SubsetName, ...] = ("mt", "comp")


class QuestionSettings(Settings):
    """The English instruction data."""

    path: PathText = Field(..., description="JSON, JSONL or Parquet file")
    layout: Literal["gsm8k", "alpaca"] = Field(
        ..., description="gsm8k: question, answer; alpaca: instruction, input, output"
    )
    first: NonNegativeInt = Field(default=0, description="rows to skip")
    count: PositiveInt | None = Field(default=None, description="rows to take after those skipped; all by default")


class MemorySettings(Settings):
    """Translations from English that are there already."""

    language: str = Field(..., description="code of the other language")
    path: PathText = Field(..., description="UTF-8 file of lines, two columns parted by a tab, English first")


class TranslatorSettings(Settings):
    """What translates questions and responses."""

    name: Literal["nllb", "ctranslate2", "memory", "model"] = Field(
        default="nllb",
        description="nllb: a translation model of the NLLB family through transformers; ctranslate2: the same, "
        "converted, on all GPUs; memory: tables of translations that are there already; these three line by line; "
        "model: the model itself, through the rollout engine",
    )
    path: PathText = Field(
        default="facebook/nllb-200-3.3B",
        description="nllb: HF folder or hub name; ctranslate2: folder that ct2-transformers-converter has made",
    )
    memories: tuple[MemorySettings, ...] = Field(default=(), description="memory: one for each target language")
    beams: PositiveInt = Field(default=4, description="nllb, ctranslate2: beams")
    batch_size: Count = Field(default=16, description="nllb, ctranslate2: lines translated at once")
    max_tokens: PositiveInt = Field(default=512, description="longest translation; of a line, but with model")
    compute_type: Literal[
        "default", "auto", "int8", "int8_float16", "int8_bfloat16", "float16", "bfloat16", "float32"
    ] = Field(default="default", description="ctranslate2: precision; the folder's by default")


class QualitySettings(Settings):
    """Which translations are too bad."""

    name: Literal["cometkiwi", "off"] = Field(
        default="cometkiwi", description="cometkiwi: reference-free score of unbabel-comet; off: none is rejected"
    )
    path: PathText | None = Field(
        default=None, description="cometkiwi: folder of Unbabel/wmt22-cometkiwi-da, with hparams.yaml and checkpoints/"
    )
    least: Share = Field(default=0.8, description="lowest score that is kept")


class IdentifierSettings(Settings):
    """What tells which language a translation is in."""

    name: Literal["lingua", "cld3", "heliport", "fasttext", "off"] = Field(
        default="lingua",
        description="lingua, cld3, heliport: the packages lingua-language-detector, cld3-py, heliport; fasttext: a "
        "model file, by the package fasttext-predict; off: none is rejected",
    )
    path: PathText | None = Field(default=None, description="fasttext: model file, such as NLLB's or GlotLID's")


class DictionarySettings(Settings):
    """A bilingual dictionary from English."""

    language: str = Field(..., description="code of the other language")
    path: PathText = Field(..., description="file")
    form: Literal["gatitos", "muse"] = Field(
        default="gatitos", description="gatitos: two columns parted by a tab; muse: two words a line, parted by space"
    )


class CorpusSettings(Settings):
    """Sentences in English and another language, for the subsets mt and comp."""

    language: str = Field(..., description="code of the other language")
    path: PathText = Field(..., description="UTF-8 file of two columns parted by a tab, English first, no heading")
    first: NonNegativeInt = Field(default=0, description="lines to skip")
    count: PositiveInt = Field(default=1000, description="lines to take after those skipped")


class SdrrlSettings(Settings):
    """Everything of a build."""

    dir: PathText | None = Field(default=None, description="folder of the build")
    questions: QuestionSettings | None = Field(default=None, description="the English instruction data")
    targets: tuple[str, ...] = Field(default=(), description="codes of the languages to distil into")
    subsets: tuple[SubsetName, ...] = Field(
        default=(*QUESTIONS, *CORPUS),
        min_length=1,
        description="which are made: questions and responses in English (L) or the target (T), mt and comp of a corpus",
    )
    own_share: Share = Field(
        default=0.5, description="chance of a question to have the model's own response, not the data's"
    )
    code_switch: Share = Field(default=0.15, description="chance of a question's word to be said in the other language")
    own_batch: Count = Field(default=32, description="responses sampled between two writes")
    translator: TranslatorSettings = Field(default=TranslatorSettings(), description="who translates")
    quality: QualitySettings = Field(default=QualitySettings(), description="rejects bad translations")
    identifier: IdentifierSettings = Field(
        default=IdentifierSettings(), description="rejects translations into another language"
    )
    dictionaries: tuple[DictionarySettings, ...] = Field(default=(), description="for code_switch")
    corpora: tuple[CorpusSettings, ...] = Field(default=(), description="for mt and comp")

    @property
    def asks(self) -> bool:
        """Whether questions are needed at all."""
        return any(name in self.subsets for name in QUESTIONS)

    @property
    def translates(self) -> bool:
        """Whether anything is translated."""
        return any(name in self.subsets for name in ("TL", "LT", "TT"))


def build_problems(config: Config) -> list[Problem]:
    """Return what is wrong with the section for a build, and files that are not there."""
    settings = config.sdrrl
    given = {"dir": settings.dir, "targets": settings.targets, "questions": settings.questions or not settings.asks}
    found = [
        Problem(f"sdrrl.{name}", getattr(settings, name), "a build needs it", "Set it; docs/sdrrl.md has an example.")
        for name, value in given.items()
        if not value
    ]
    found += _language_problems(settings)
    if found:
        return found
    found += _file_problems(settings)
    for name in sorted({name for name in settings.subsets if settings.subsets.count(name) > 1}):
        found.append(Problem("sdrrl.subsets", name, "the subset is named twice", "Keep one."))
    found += _nested(config)
    switches = settings.code_switch > 0 and settings.asks
    has_corpus = any(name in settings.subsets for name in CORPUS)
    found += _per_language(settings, "dictionaries", switches, "Give one, or set code_switch: 0.")
    found += _per_language(settings, "corpora", has_corpus, "Give one, or leave mt and comp out.")
    found += _translator_problems(settings)
    if settings.quality.name == "cometkiwi" and settings.translates and settings.quality.path is None:
        rule = "cometkiwi needs the folder of its weights"
        remedy = (
            "Get Unbabel/wmt22-cometkiwi-da (2.3 GB, its licence is to be accepted), or set sdrrl.quality.name: off."
        )
        found.append(Problem("sdrrl.quality.path", None, rule, remedy))
    if settings.identifier.name == "fasttext" and settings.identifier.path is None:
        rule, remedy = "fasttext needs a model file", "Give NLLB's or GlotLID's, or choose another identifier."
        found.append(Problem("sdrrl.identifier.path", None, rule, remedy))
    return found


# Settings that a translator takes no notice of.
_UNUSED = {
    "nllb": ("memories", "compute_type"),
    "ctranslate2": ("memories",),
    "memory": ("path", "beams", "batch_size", "max_tokens", "compute_type"),
    "model": ("path", "memories", "beams", "batch_size", "compute_type"),
}


def _translator_problems(settings: SdrrlSettings) -> Iterator[Problem]:
    """Complain of what the translator that was chosen lacks, and of what it has no use for."""
    chosen = settings.translator
    rule = f"with sdrrl.translator.name = {chosen.name}"
    yield from without_effect("sdrrl.translator", chosen, _UNUSED[chosen.name], rule)
    if chosen.name == "memory":
        remedy = "Give one, or choose another translator."
        yield from _per_language(settings, "translator.memories", settings.translates, remedy)
    if settings.translates and chosen.name == "ctranslate2" and (why := why_no_file(Path(chosen.path) / "model.bin")):
        why = f"model.bin in it: {why}"
        remedy = "Give a folder that ct2-transformers-converter has made; docs/sdrrl.md has the command."
        yield Problem("sdrrl.translator.path", chosen.path, why, remedy)


def _by_language(
    settings: SdrrlSettings,
) -> dict[str, tuple[DictionarySettings | CorpusSettings | MemorySettings, ...]]:
    """Every list of files of one language each, by the name of its setting."""
    return {
        "dictionaries": settings.dictionaries,
        "corpora": settings.corpora,
        "translator.memories": settings.translator.memories,
    }


def _per_language(settings: SdrrlSettings, name: str, needed: bool, remedy: str) -> Iterator[Problem]:
    """Complain of target languages that have none of something, of those that have two, and of what nobody uses."""
    given = [language(one.language).code for one in _by_language(settings)[name]]
    for target in settings.targets if needed else ():
        if language(target).code not in given:
            yield Problem(f"sdrrl.{name}", ", ".join(given) or None, f"there is none for {target}", remedy)
    for code in sorted({code for code in given if given.count(code) > 1}):
        yield Problem(f"sdrrl.{name}", code, "two are given for this language", "Keep one.")
    targets = {language(target).code for target in settings.targets}
    for code in sorted(set(given) - targets if needed else set(given)):
        yield Problem(
            f"sdrrl.{name}", code, "nothing that is built has a use for it", "Remove it, or add what uses it."
        )


def _nested(config: Config) -> Iterator[Problem]:
    """Complain of folders that lie in each other: moving the one aside would take the other along."""
    build, run = (Path(folder).absolute() for folder in (config.sdrrl.dir or "", config.run.dir))
    if config.sdrrl.dir and (build == run or build in run.parents or run in build.parents):
        rule = f"run.dir is {config.run.dir}, and neither may lie in the other"
        yield Problem("sdrrl.dir", config.sdrrl.dir, rule, "Give folders beside each other.")


def _language_problems(settings: SdrrlSettings) -> Iterator[Problem]:
    named = [("targets", name) for name in settings.targets]
    named += [(name, one.language) for name, files in _by_language(settings).items() for one in files]
    for setting, name in named:
        if problem := language_problem(name):
            yield Problem(f"sdrrl.{setting}", name, *problem)
        elif language(name).code == "EN":
            yield Problem(f"sdrrl.{setting}", name, "English is the language that is distilled from", "Remove it.")
    codes = [language(name).code for name in settings.targets if not language_problem(name)]
    for code in sorted({code for code in codes if codes.count(code) > 1}):
        yield Problem("sdrrl.targets", code, "the language is named twice", "Keep one.")


def _file_problems(settings: SdrrlSettings) -> Iterator[Problem]:
    files = [("questions", settings.questions.path)] if settings.questions else []
    files += [(f"{name}.{i}", one.path) for name, of in _by_language(settings).items() for i, one in enumerate(of)]
    if settings.identifier.path is not None:
        files.append(("identifier", settings.identifier.path))
    for setting, path in files:
        if rule := why_no_file(path):
            yield Problem(f"sdrrl.{setting}.path", path, rule, "Paths start at the current directory.")
