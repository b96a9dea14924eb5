"""Which translations are kept: good enough, and in the language that was asked for."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from megatron_copsd.config.sections.sdrrl import IdentifierSettings, QualitySettings
from megatron_copsd.errors import UserError, describe
from megatron_copsd.languages import Language, language, language_problem
from megatron_copsd.sdrrl.packages import package

_GIVE_COMET = "Give the folder of Unbabel/wmt22-cometkiwi-da, or set sdrrl.quality.name: off."
_IDENTIFIER, _NO_IDENTIFIER = "sdrrl.identifier", "Or switch the filter off with sdrrl.identifier.name: off."
# What cld3 knows, by its own codes: the package has no list of them.
_CLD3 = (
    "af am ar az be bg bn bs ca ceb co cs cy da de el en eo es et eu fa fi fil fr fy ga gd gl gu ha haw hi hmn hr ht "
    "hu hy id ig is it iw ja jv ka kk km kn ko ku ky la lb lo lt lv mg mi mk ml mn mr ms mt my ne nl no ny pa pl ps pt "
    "ro ru sd si sk sl sm sn so sq sr st su sv sw ta te tg th tr uk ur uz vi xh yi yo zh zu"
)


class QualityEstimator(Protocol):
    """Scores translations without a reference, from 0 to 1."""

    def scores(self, sources: Sequence[str], translations: Sequence[str]) -> list[float]:
        """Return a score of each translation."""
        ...


class Identifier(Protocol):
    """Tells languages apart."""

    def covers(self, asked: Language) -> bool:
        """Whether it knows a language."""
        ...

    def identify(self, text: str) -> str | None:
        """Return a language's code, ours where we have one; None where it can't tell."""
        ...


def require_covered(identifier: Identifier, name: str, languages: Sequence[Language]) -> None:
    """Refuse an identifier that lacks a language: it would reject all of it, or pass what it takes for another.

    Raises:
        UserError: naming the languages it lacks.
    """
    lacking = [one.code for one in languages if not identifier.covers(one)]
    if lacking:
        rule = f"it does not know {', '.join(lacking)}"
        remedy = "Choose another (docs/sdrrl.md has a table), or switch the filter off with sdrrl.identifier.name: off."
        raise UserError(describe("sdrrl.identifier.name", name, rule, remedy))


def load_identifier(settings: IdentifierSettings) -> Identifier | None:
    """Return the identifier that is asked for; None where it is switched off.

    Raises:
        UserError: its package is not installed, or its model can't be read.
    """
    if settings.name == "off":
        return None
    if settings.name == "fasttext":
        assert settings.path is not None
        return _Fasttext(package("fasttext", "fasttext-predict", _IDENTIFIER, _NO_IDENTIFIER), settings.path)
    if settings.name == "heliport":
        return _Heliport(package("heliport", "heliport", _IDENTIFIER, _NO_IDENTIFIER))
    if settings.name == "cld3":
        return _Cld3(package("gcld3", "cld3-py", _IDENTIFIER, _NO_IDENTIFIER))
    return _Lingua(package("lingua", "lingua-language-detector", _IDENTIFIER, _NO_IDENTIFIER))


def load_estimator(settings: QualitySettings, device: str) -> QualityEstimator | None:
    """Return the estimator that is asked for; None where it is switched off.

    Raises:
        UserError: its package is not installed, or its weights can't be read.
    """
    if settings.name == "off":
        return None
    assert settings.path is not None
    return _CometKiwi(
        package("comet", "unbabel-comet", "sdrrl.quality", "Or set sdrrl.quality.name: off."),
        Path(settings.path),
        device,
    )


def check_estimator(settings: QualitySettings) -> None:
    """See that the estimator's package and files are there, without loading them.

    Raises:
        UserError: one is not.
    """
    if settings.name == "off":
        return
    assert settings.path is not None
    if importlib.util.find_spec("comet") is None:
        package("comet", "unbabel-comet", "sdrrl.quality", "Or set sdrrl.quality.name: off.")
    for path in (Path(settings.path) / "hparams.yaml", Path(settings.path) / "checkpoints"):
        if not path.exists():
            raise UserError(
                describe("sdrrl.quality.path", settings.path, f"there is no {path.name} in it", _GIVE_COMET)
            )


def _ours(code: str) -> str:
    return code if language_problem(code) else language(code).code


class _Lingua:
    """Implements ``Identifier``."""

    def __init__(self, lingua: ModuleType) -> None:
        self._codes = {_ours(one.iso_code_639_3.name.lower()) for one in lingua.Language.all()}
        self._detector: Any = lingua.LanguageDetectorBuilder.from_all_languages().build()

    def covers(self, asked: Language) -> bool:
        """See ``Identifier``."""
        return asked.code in self._codes

    def identify(self, text: str) -> str | None:
        """See ``Identifier``."""
        found = self._detector.detect_language_of(text)
        return _ours(found.iso_code_639_3.name.lower()) if found else None


class _Heliport:
    """Implements ``Identifier``."""

    def __init__(self, heliport: ModuleType) -> None:
        # The package has no list of its languages but this table, which it reads itself.
        table = files(heliport).joinpath("confidenceThresholds").read_text(encoding="utf-8")
        self._codes = {_ours(line.split("\t")[0]) for line in table.splitlines() if line}
        self._identifier: Any = heliport.Identifier()

    def covers(self, asked: Language) -> bool:
        """See ``Identifier``."""
        return asked.code in self._codes

    def identify(self, text: str) -> str | None:
        """See ``Identifier``."""
        found = self._identifier.identify(text.replace("\n", " "))
        return None if found == "und" else _ours(found)


class _Cld3:
    """CLD3, the paper's; implements ``Identifier``."""

    def __init__(self, cld3: ModuleType) -> None:
        self._codes = {_ours(code) for code in _CLD3.split()}
        self._identifier: Any = cld3.NNetLanguageIdentifier(min_num_bytes=0, max_num_bytes=4096)

    def covers(self, asked: Language) -> bool:
        """See ``Identifier``."""
        return asked.code in self._codes

    def identify(self, text: str) -> str | None:
        """See ``Identifier``."""
        found = self._identifier.FindLanguage(text=text)
        # A language in Latin letters that is not usually written so is another code: "ja-Latn".
        return _ours(found.language) if found.is_reliable else None


class _Fasttext:
    """A model whose labels are FLORES or ISO codes; implements ``Identifier``."""

    _PREFIX = "__label__"

    def __init__(self, fasttext: ModuleType, path: str) -> None:
        try:
            self._model: Any = fasttext.load_model(path)
        except (ValueError, RuntimeError) as error:
            rule = f"no model can be read from this file ({error})"
            raise UserError(describe("sdrrl.identifier.path", path, rule, "Give a model of fastText.")) from error
        self._codes = {_ours(label.removeprefix(self._PREFIX)) for label in self._model.labels}

    def covers(self, asked: Language) -> bool:
        """See ``Identifier``."""
        return asked.code in self._codes

    def identify(self, text: str) -> str | None:
        """See ``Identifier``."""
        found = self._model.predict(text.replace("\n", " "))
        return _ours(found[0][0].removeprefix(self._PREFIX)) if found and found[0] else None


class _CometKiwi:
    """Implements ``QualityEstimator``.

    The weights are read as tensors alone: the package's own loader would run what a checkpoint says.
    """

    def __init__(self, comet: ModuleType, folder: Path, device: str) -> None:
        import torch
        import yaml

        try:
            (checkpoint,) = (folder / "checkpoints").glob("*.ckpt")
            settings = yaml.safe_load((folder / "hparams.yaml").read_text(encoding="utf-8"))
            kind = importlib.import_module("comet.models").str2model[settings.pop("class_identifier")]
            model = kind(**{**settings, "load_pretrained_weights": False})
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
            # Older checkpoints hold the numbers of positions, which later versions of transformers compute.
            model.load_state_dict({name: t for name, t in state.items() if not name.endswith(".position_ids")})
        except (
            OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError, yaml.YAMLError,
            pickle.UnpicklingError,
        ) as error:  # fmt: skip
            rule = f"no model of {comet.__name__} can be read from this folder ({type(error).__name__}: {error})"
            raise UserError(describe("sdrrl.quality.path", str(folder), rule, _GIVE_COMET)) from error
        self._model: Any = model.to(device).eval()
        self._gpus = int(device == "cuda")

    def scores(self, sources: Sequence[str], translations: Sequence[str]) -> list[float]:
        """See ``QualityEstimator``."""
        rows = [{"src": source, "mt": text} for source, text in zip(sources, translations, strict=True)]
        return list(self._model.predict(rows, gpus=self._gpus, progress_bar=False).scores)
