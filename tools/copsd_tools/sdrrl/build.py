"""``copsd sdrrl build``: from a configuration to the workers of a build, and what is said on the way."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from copsd_tools.command_line.outputs import check_folder
from megatron_copsd import platform
from megatron_copsd.config.load import LoadedConfig, load_config
from megatron_copsd.config.schema import Config
from megatron_copsd.config.sections import model, sglang
from megatron_copsd.config.sections.sdrrl import build_problems
from megatron_copsd.data.prompts import PromptBuilder
from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.folder import TensorReader, resolve_folder
from megatron_copsd.hf.read import read_architecture
from megatron_copsd.hf.texts.stops import stop_ids
from megatron_copsd.hf.texts.tokenizer import load_tokenizer
from megatron_copsd.hf.weight_files import check_weights
from megatron_copsd.languages import language
from megatron_copsd.records.claim import claimed, move_aside
from megatron_copsd.records.origin import tokenizer_digest
from megatron_copsd.records.paths import RunFolder
from megatron_copsd.rollout.engine import RolloutEngine, Sampling
from megatron_copsd.sdrrl.build import Build, Watch, Workers, begin, is_build
from megatron_copsd.sdrrl.filters import check_estimator, load_estimator, load_identifier, require_covered
from megatron_copsd.sdrrl.respond import Responder
from megatron_copsd.sdrrl.sources import read_corpus, read_questions
from megatron_copsd.sdrrl.switching import read_dictionary
from megatron_copsd.sdrrl.translators.ctranslate import CTranslateLines
from megatron_copsd.sdrrl.translators.memory import MemoryLines
from megatron_copsd.sdrrl.translators.nllb import NllbLines
from megatron_copsd.sdrrl.translators.own import OwnTranslator
from megatron_copsd.sdrrl.translators.translator import LineTranslator, Translator


def build(path: str, overrides: Sequence[str], *, overwrite: bool, check_only: bool) -> int:
    """Make a build, or go on with one; returns the exit code.

    Raises:
        UserError: something that was given is wrong.
    """
    loaded = load_config(path, overrides)
    _check(loaded)
    config, settings = loaded.config, loaded.config.sdrrl
    assert settings.dir is not None
    folder = RunFolder(Path(settings.dir))
    check_folder(folder.root, loaded.places.named("sdrrl.dir"))
    plan = _Plan(config, folder.root)
    if check_only:
        print(plan.size())
        return 0
    if overwrite and folder.root.exists() and any(folder.root.iterdir()):
        if not is_build(folder.root):
            rule = "--overwrite moves a build aside, and this is none"
            raise UserError(describe("sdrrl.dir", str(folder.root), rule, "Give another folder."))
        print(f"{folder.root}: the earlier build is in {move_aside(folder)} now", flush=True)
    progress = _Progress()
    with claimed(folder), _responder(config) as responder:
        if begin(folder.root, _depends_on(config)):
            print(f"{folder.root}: going on with an earlier build", file=sys.stderr, flush=True)
        summary = plan.build(responder, progress).run()
    from copsd_tools.sdrrl.show import counts_table

    Console(soft_wrap=True).print(counts_table(summary))
    print("seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in progress.seconds.items()))
    print(f"{folder.root / 'rows.jsonl'}: an epoch draws {summary['groups']} groups of variants")
    return 0


def _check(loaded: LoadedConfig) -> None:
    config = loaded.config
    found = [*build_problems(config), *model.problems(config), *sglang.problems(config)]
    if found:
        named = loaded.places.named
        raise UserError("\n".join(describe(named(p.setting), p.value, p.rule, p.remedy) for p in found))


class _Plan:
    """Everything that a build reads before it works."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._config, self._settings, self._folder = config, config.sdrrl, folder
        settings = config.sdrrl
        targets = [language(code) for code in settings.targets]
        self.questions = read_questions(settings.questions) if settings.questions and settings.asks else []
        self.corpora = {
            language(one.language).code: read_corpus(one, f"sdrrl.corpora.{i}")
            for i, one in enumerate(settings.corpora)
        }
        self._dictionaries = {
            language(one.language).code: read_dictionary(one.path, one.form) for one in settings.dictionaries
        }
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        if settings.translates:
            check_estimator(settings.quality)
        self._identifier = load_identifier(settings.identifier) if settings.translates else None
        if self._identifier is not None:
            require_covered(self._identifier, settings.identifier.name, targets)

    def build(self, responder: Callable[[], Responder], watch: Watch) -> Build:
        settings = self._settings
        estimator = load_estimator(settings.quality, self._device) if settings.translates else None

        @cache
        def translator() -> Translator:
            chosen = settings.translator
            if chosen.name == "model":
                return OwnTranslator(responder(), chosen.max_tokens)
            if chosen.name == "memory":
                return LineTranslator(MemoryLines(chosen.memories))
            if chosen.name == "ctranslate2":
                return LineTranslator(CTranslateLines(chosen, torch.cuda.device_count()))
            return LineTranslator(NllbLines(chosen, self._device))

        workers = Workers(responder, translator, estimator, self._identifier, self._dictionaries)
        seed = self._config.run.seed
        return Build(settings, seed, self._folder, self.questions, self.corpora, workers, watch)

    def size(self) -> str:
        """Say how much there is to do, and with what."""
        settings, targets = self._settings, len(self._settings.targets)
        lines = []
        if settings.asks:
            lines.append(
                f"{len(self.questions)} questions, about {settings.own_share:.0%} with the model's own response"
            )
        if settings.translates:
            chosen = settings.translator
            by = {"model": self._config.model.path, "memory": "tables"}.get(chosen.name, chosen.path)
            lines.append(f"translations into {targets} languages by {by}")
            lines.append(f"quality: {settings.quality.name}; language: {settings.identifier.name}")
        lines += [f"{len(pairs)} sentences in English and {code}" for code, pairs in self.corpora.items()]
        lines += [
            f"{len(out.words)} words from English to {code}, {len(back.words)} back"
            for code, (out, back) in self._dictionaries.items()
        ]
        return "\n".join([*lines, f"{self._folder}: can be built"])


def _depends_on(config: Config) -> dict[str, Any]:
    """Everything that the rows of a build depend on, as JSON has it; files and models by content."""
    settings = config.sdrrl
    found: dict[str, Any] = {
        f"sdrrl.{name}": value for name, value in settings.model_dump(mode="json").items() if name != "dir"
    }
    translator = settings.translator
    read = [one.path for one in (*settings.dictionaries, *settings.corpora, *translator.memories)]
    read += [os.path.join(translator.path, "model.bin")] if translator.name == "ctranslate2" else []
    read += [settings.questions.path] if settings.questions else []
    read += [settings.identifier.path] if settings.identifier.path else []
    for path in read:
        with Path(path).open("rb") as file:
            found[f"{path} (its content)"] = hashlib.file_digest(file, "sha256").hexdigest()
    found |= {"run.seed": config.run.seed, "prompt": config.prompt.model_dump(mode="json")}
    sampling = ("temperature", "top_p", "top_k", "max_response_tokens", "stop_token_ids", "engine")
    found |= {f"rollout.{name}": getattr(config.rollout, name) for name in sampling}
    found["rollout.dtype"] = config.rollout.dtype or config.model.dtype
    weights = TensorReader(resolve_folder(config.model.path, config.model.revision))
    found["model.path (its weights)"] = weights.fingerprint()
    architecture = read_architecture(config.model.path, config.model.revision)
    tokenizer = load_tokenizer(config.model.path, config.model.revision, architecture.vocab_size)
    found["model.path (its tokenizer)"] = tokenizer_digest(tokenizer)
    found["model.path (its chat template)"] = str(tokenizer.chat_template)
    if settings.translates and translator.name == "nllb" and os.path.isdir(translator.path):
        found["sdrrl.translator.path (its weights)"] = TensorReader(Path(translator.path)).fingerprint()
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


@contextmanager
def _responder(config: Config) -> Iterator[Callable[[], Responder]]:
    """Yield what opens the rollout engine when a response is first asked for; it is closed at the end."""
    opened: list[RolloutEngine] = []

    @cache
    def responder() -> Responder:
        architecture = read_architecture(config.model.path, config.model.revision)
        check_weights(config.model.path, architecture, config.rollout.dtype or config.model.dtype)
        with platform.importing_megatron():
            from megatron_copsd.engines import open_engine, take_folder_weights
        here = platform.start(config.parallel.timeout_s)
        tokenizer = load_tokenizer(config.model.path, config.model.revision, architecture.vocab_size)
        engine = open_engine(config, config.rollout.engine, tokenizer, here, print)
        opened.append(engine)
        take_folder_weights(engine, config)
        rollout = config.rollout
        stops = stop_ids(config, tokenizer, architecture.vocab_size)
        sampling = Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_response_tokens, stops)
        return Responder(engine, PromptBuilder(tokenizer, config.prompt), sampling, config.run.seed)

    try:
        yield responder
    finally:
        for engine in opened:
            engine.close()
        if opened:
            platform.stop()


class _Progress:
    """Shows stages and counts their seconds: a bar each on a terminal, now and then a line elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """See ``Watch``."""
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        terminal = self._console.is_terminal
        said = -1
        start = time.monotonic()
        with Progress(*columns, console=self._console, disable=not terminal) as bar:
            task = bar.add_task(name, total=total)

            def done(count: int) -> None:
                nonlocal said
                bar.update(task, completed=count)
                tenth = 10 * count // max(total, 1)
                if not terminal and said != tenth:
                    said = tenth
                    self._console.print(f"{name}: {count} of {total}")

            yield done
            bar.update(task, completed=total)
        self.seconds[name] = time.monotonic() - start
