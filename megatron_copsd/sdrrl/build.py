"""A build from start to end: own responses, translations, filters, rows.

D = {(x, y)} are the questions with the data's responses, G = {(x, y')} with the model's own, D_synth takes either for
each question by a coin (equation 4 of arXiv 2402.12204). Of D_synth come LL (x, y), TL (T(x), y), LT (x, T(y)) and
TT (T(x), T(y)), T a translation; of a corpus come mt and comp.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_copsd.config.sections.sdrrl import QUESTIONS, SdrrlSettings
from megatron_copsd.errors import UserError, describe
from megatron_copsd.languages import Language, language
from megatron_copsd.records.disk import read_text, replace_text, replacing
from megatron_copsd.sdrrl.chance import uniform
from megatron_copsd.sdrrl.filters import Identifier, QualityEstimator
from megatron_copsd.sdrrl.journal import Journal
from megatron_copsd.sdrrl.respond import Responder
from megatron_copsd.sdrrl.sources import Question, SentencePair
from megatron_copsd.sdrrl.switching import Dictionary
from megatron_copsd.sdrrl.templates import completion_question, translation_question
from megatron_copsd.sdrrl.translators.translator import Translator, translated

ROWS, REJECTED, SUMMARY = "rows.jsonl", "rejected.jsonl", "summary.json"
_SETTINGS, _RESPONSES = "build.json", "responses.jsonl"
_TRANSLATIONS, _JUDGEMENTS = "translations.jsonl", "judgements.jsonl"
_ENGLISH = language("EN")


class Watch(Protocol):
    """Shows how a build goes on."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Be within a stage, of which there is so much to do; what is yielded is told how much of it is done."""
        ...


@dataclass(frozen=True)
class Workers:
    """Who does the work; the first two are made when they are first needed.

    Attributes:
        responder: gives own responses.
        translator: translates.
        estimator: scores translations; None where none is to be rejected for its score.
        identifier: names their language; None likewise.
        dictionaries: by language, from English and back.
    """

    responder: Callable[[], Responder]
    translator: Callable[[], Translator]
    estimator: QualityEstimator | None
    identifier: Identifier | None
    dictionaries: Mapping[str, tuple[Dictionary, Dictionary]]


@dataclass(frozen=True)
class Build:
    """A build and its folder.

    Attributes:
        settings: the section ``sdrrl``.
        seed: ``run.seed``.
        folder: where everything is written.
        questions: the English instruction data.
        corpora: sentences in two languages, by the other's code.
        workers: who does the work.
        watch: shows progress.
    """

    settings: SdrrlSettings
    seed: int
    folder: Path
    questions: Sequence[Question]
    corpora: Mapping[str, Sequence[SentencePair]]
    workers: Workers
    watch: Watch

    def run(self) -> Mapping[str, Any]:
        """Do what is not done yet, and write the rows; returns the summary.

        Raises:
            UserError: a worker gives nonsense, or the disk is full; what was finished is kept.
        """
        if self.settings.translates:
            with self.watch.stage("loading", 1):
                self.workers.translator()  # what it lacks is told before anything is sampled
        responses = self._respond() if self.settings.asks else {}
        translations = self._translate(responses) if self.settings.translates else {}
        rows: list[dict[str, Any]] = []
        rejected: list[dict[str, Any]] = []
        for code in self.settings.targets:
            target = language(code)
            for question in self.questions if self.settings.asks else ():
                for row in self._variants(question, target, responses[question.key], translations):
                    (rejected if "reason" in row else rows).append(row)
            for pair in self.corpora.get(target.code, ()):
                for row in self._corpus_rows(pair, target):
                    (rejected if "reason" in row else rows).append(row)
        _write_rows(self.folder / ROWS, rows)
        _write_rows(self.folder / REJECTED, rejected)
        summary = _summary(rows, rejected)
        replace_text(self.folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
        return summary

    def _respond(self) -> dict[str, dict[str, Any]]:
        """The response of each question in D_synth, by the question's key: {"text", "own", "reason"}."""
        own = [q for q in self.questions if uniform(self.seed, "own", q.key) < self.settings.own_share]
        journal = Journal(self.folder / _RESPONSES, ("text", "ended"))
        asked = {question.key: (question.number, question.problem) for question in own}
        with self.watch.stage("own responses", len(own)) as done:
            for start, batch in self._batches(list(asked), journal):
                answers = self.workers.responder().answer([asked[key] for key in batch])
                rows: list[dict[str, Any]] = [
                    {"key": key, "text": answer.text, "ended": answer.ended}
                    for key, answer in zip(batch, answers, strict=True)
                ]
                journal.add([row for row in rows if row["key"] not in journal])
                done(start + len(batch))
        chosen = {q.key: {"text": q.response, "own": False, "reason": None} for q in self.questions}
        for question in own:
            row = journal[question.key]
            reason = None if row["ended"] else "the model's own response does not end within the limits"
            if reason is None and not row["text"]:
                reason = "the model's own response is empty"
            chosen[question.key] = {"text": row["text"], "own": True, "reason": reason}
        return chosen

    def _translate(self, responses: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Translate what the subsets need, and judge it.

        Returns:
            By question and language, and by part (``problem``, ``solution``): {"text", "quality", "language"}.
        """
        texts = {
            _key(question, language(code)): {"problem": question.problem, "solution": responses[question.key]["text"]}
            for code in self.settings.targets
            for question in self.questions
            if responses[question.key]["reason"] is None
        }
        found = self._in_stage("translations", _TRANSLATIONS, texts, self._translated)
        kept = {key: {part: (texts[key][part], text) for part, text in found[key].items()} for key in texts}
        judged = self._in_stage("filters", _JUDGEMENTS, kept, self._judged)
        return {
            key: {part: {"text": found[key][part], **judgement} for part, judgement in judged[key].items()}
            for key in texts
        }

    def _in_stage(
        self,
        stage: str,
        name: str,
        given: Mapping[str, Mapping[str, Any]],
        work: Callable[[Sequence[Any], Language], Sequence[Any]],
    ) -> dict[str, dict[str, Any]]:
        """Do a stage's work on each needed part of what is given, a batch of one language at a time.

        Args:
            stage: what it is called.
            name: of the journal's file.
            given: by question and language, then by part.
            work: gives a result for each, in order.
        """
        parts = self._parts()
        journal = Journal(self.folder / name, parts)
        ends = {code: f"/{language(code).code}" for code in self.settings.targets}
        with self.watch.stage(stage, len(given)) as done:
            before = 0
            for code, end in ends.items():
                keys = [key for key in given if key.endswith(end)]
                for start, batch in self._batches(keys, journal):
                    results = {part: work([given[key][part] for key in batch], language(code)) for part in parts}
                    rows = [{"key": key, **{part: results[part][i] for part in parts}} for i, key in enumerate(batch)]
                    journal.add([row for row in rows if row["key"] not in journal])
                    done(before + start + len(batch))
                before += len(keys)
        return {key: {part: journal[key][part] for part in parts} for key in given}

    def _batches(self, keys: Sequence[str], journal: Journal) -> Iterator[tuple[int, Sequence[str]]]:
        """Yield the batches that are not finished, whole: what is computed side by side is the same after a stop."""
        size = self.settings.own_batch
        for start in range(0, len(keys), size):
            if not all(key in journal for key in keys[start : start + size]):
                yield start, keys[start : start + size]

    def _parts(self) -> tuple[str, ...]:
        """Which parts of a row are translated for any subset."""
        subsets = self.settings.subsets
        needed = {"problem": "TL" in subsets or "TT" in subsets, "solution": "LT" in subsets or "TT" in subsets}
        return tuple(part for part, is_needed in needed.items() if is_needed)

    def _translated(self, texts: Sequence[str], target: Language) -> list[str]:
        return translated(self.workers.translator(), texts, _ENGLISH, target)

    def _judged(self, pairs: Sequence[tuple[str, str]], target: Language) -> list[dict[str, Any]]:
        """Score translations, each beside its source, and name their languages."""
        sources, found = [source for source, _ in pairs], [text for _, text in pairs]
        estimator, identifier = self.workers.estimator, self.workers.identifier
        scores: Sequence[float | None] = [None] * len(found)
        if estimator is not None:
            scores = estimator.scores(sources, found)
            if len(scores) != len(found):
                rule = f"it gave {len(scores)} scores for {len(found)} translations"
                raise UserError(describe("sdrrl.quality", type(estimator).__name__, rule, "Use another."))
        return [
            {
                "quality": None if score is None else float(score),
                "language": identifier.identify(text) if identifier is not None and text else None,
            }
            for text, score in zip(found, scores, strict=True)
        ]

    def _reason(self, judged: Mapping[str, Any], target: Language) -> str | None:
        """Why a translation is rejected; None where it is kept."""
        if not judged["text"]:
            return "there is no translation: it is empty, does not end, or is in no table"
        if judged["quality"] is not None and not judged["quality"] >= self.settings.quality.least:
            return "the translation's quality is too low"
        if self.workers.identifier is not None and judged["language"] != target.code:
            return f"the translation is in {judged['language'] or 'no known language'}"
        return None

    def _variants(
        self, question: Question, target: Language, response: Mapping[str, Any], translations: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Rows of LL, TL, LT and TT of one question; those that are rejected have a ``reason``."""
        key = _key(question, target)
        judged: Mapping[str, Any] = translations.get(key, {})
        for subset in (name for name in self.settings.subsets if name in QUESTIONS):
            problem, solution = question.problem, response["text"]
            reason = response["reason"]
            provenance: dict[str, Any] = {"question": question.where, "response": "own" if response["own"] else "data"}
            for part, letter in (("problem", subset[0]), ("solution", subset[1])):
                if letter == "T" and reason is None:
                    found = judged[part]
                    reason = self._reason(found, target)
                    provenance[f"{part}_translated"] = {n: found[n] for n in ("quality", "language")}
                    problem, solution = (found["text"], solution) if part == "problem" else (problem, found["text"])
            row: dict[str, Any] = {
                "id": f"{key}/{subset}", "group": key, "target": target.code, "subset": subset,
                "language": target.code if subset[1] == "T" else "EN",
            }  # fmt: skip
            if reason is None and target.code in self.workers.dictionaries:
                dictionary = self.workers.dictionaries[target.code][subset[0] == "T"]
                names = (self.seed, "switch", row["id"])
                problem, switches = dictionary.switched(problem, self.settings.code_switch, *names)
                provenance["switched"] = [list(switch) for switch in switches]
            row |= {"problem": problem, "solution": solution, "verbatim": False, "provenance": provenance}
            yield row if reason is None else {**row, "reason": reason}

    def _corpus_rows(self, pair: SentencePair, target: Language) -> Iterator[dict[str, Any]]:
        """Rows of mt, both ways, and of comp."""
        key = f"{pair.key}/{target.code}"

        def row(name: str, subset: str, question: str, answer: str, spoken: Language) -> dict[str, Any]:
            return {
                "id": f"{key}/{name}", "group": f"{key}/{name}", "target": target.code, "subset": subset,
                "language": spoken.code, "problem": question, "solution": answer, "verbatim": True,
                "provenance": {"question": pair.where, "response": "data"},
            }  # fmt: skip

        if "mt" in self.settings.subsets:
            yield row("mt-out", "mt", translation_question(pair.english, _ENGLISH, target), pair.other, target)
            yield row("mt-in", "mt", translation_question(pair.other, target, _ENGLISH), pair.english, _ENGLISH)
        if "comp" in self.settings.subsets:
            question = completion_question(pair.other, target, self.seed, "comp", key)
            found = row("comp", "comp", question or pair.other, pair.other, target)
            yield found if question else {**found, "reason": "the sentence can't be cut"}


def is_build(folder: Path) -> bool:
    """Whether a folder is a build's."""
    return (folder / _SETTINGS).is_file()


def begin(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Write down what a build is made with, or see that it is what it was begun with.

    Args:
        folder: of the build; made if it is not there.
        settings: everything that its rows depend on.

    Returns:
        Whether it was begun before.

    Raises:
        UserError: it was begun with something else, or the folder has files of others.
    """
    path = folder / _SETTINGS
    if not path.exists():
        for name in (ROWS, REJECTED, SUMMARY, _RESPONSES, _TRANSLATIONS, _JUDGEMENTS):
            if os.path.lexists(folder / name):
                rule = f"{folder} has this file and no {_SETTINGS}: it is not a build's"
                raise UserError(describe("sdrrl.dir", name, rule, "Give another folder."))
        replace_text(path, json.dumps(settings, indent=1) + "\n")
        return False
    try:
        before = json.loads(read_text(path))
        differences = [name for name in settings if before[name] != settings[name]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        rule = f"does not say what the build was begun with ({type(error).__name__})"
        raise UserError(describe(str(path), path.name, rule, "Give another sdrrl.dir, or --overwrite.")) from error
    if differences:
        name = differences[0]
        rule = f"the build in {folder} was begun with {before[name]!r}"
        remedy = "Give another sdrrl.dir, or move it aside with --overwrite."
        raise UserError(describe(name, settings[name], rule, remedy))
    return True


def _key(question: Question, target: Language) -> str:
    return f"{question.key}/{target.code}"


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _summary(rows: Sequence[Mapping[str, Any]], rejected: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts by language and subset, and by reason."""
    kept = Counter((row["target"], row["subset"]) for row in rows)
    lost = Counter((row["target"], row["subset"], row["reason"]) for row in rejected)
    return {
        "rows": [{"target": t, "subset": s, "rows": n} for (t, s), n in sorted(kept.items())],
        "rejected": [{"target": t, "subset": s, "reason": r, "rows": n} for (t, s, r), n in sorted(lost.items())],
        "groups": len({row["group"] for row in rows}),
    }
