"""Which problems, and how they become prompts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from megatron_copsd.config.paths import why_no_file
from megatron_copsd.config.settings import (
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Problem,
    Settings,
    without_effect,
)
from megatron_copsd.languages import language_problem
from megatron_copsd.types import View

if TYPE_CHECKING:
    from megatron_copsd.config.schema import Config

_FILE_SUFFIXES = {".json", ".jsonl", ".parquet", ".tsv"}


class DataSource(Settings):
    """One set of problems and how its rows are laid out."""

    name: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9_.-]+$", description="label in metrics; the file's by default"
    )
    path: PathText = Field(..., description="JSON, JSONL, Parquet or TSV file, or a hub data set name")
    layout: Literal["reference", "released", "parallel", "subsets"] = Field(
        default=...,
        description="reference: problem, solution, problem_<lang>; released: problem, problem_translated, solution, "
        "Answer, language_short; parallel: TSV of question and answer, aligned row by row with english and solutions; "
        "subsets: what copsd sdrrl build writes, for sft",
    )
    language: str = Field(..., description="code of the problems' language, e.g. SWA")
    english: PathText | None = Field(default=None, description="parallel layout: TSV of the English statements")
    solutions: PathText | None = Field(
        default=None, description="parallel layout: JSONL with the English worked solutions (answer)"
    )
    split: str = Field(default="train", description="split of a hub data set")
    first: NonNegativeInt = Field(default=0, description="rows to skip")
    count: PositiveInt | None = Field(default=None, description="rows to take after those skipped; all by default")
    subsets: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="subsets layout: which are trained on; all by default"
    )
    view: Literal["student", "teacher"] = Field(
        default="student", description="sft: which prompt the responses are trained on"
    )
    weight: PositiveFloat | Literal["rows"] = Field(
        default=1.0,
        description="share of the training stream, relative to the other sources; rows: as many as it has problems, "
        "or groups of variants, so that an epoch draws each once",
    )

    @property
    def label(self) -> str:
        """What metrics call this source."""
        return self.name or f"{PurePath(self.path).stem}-{self.language.lower()}"


class DataSettings(Settings):
    """Which problems are trained on and which are held out."""

    train: tuple[DataSource, ...] = Field(..., min_length=1, description="sources of the training stream")
    eval: tuple[DataSource, ...] = Field(default=(), description="held-out sources, each reported by itself")
    validation: tuple[DataSource, ...] = Field(
        default=(), description="sft: held-out sources whose loss is measured when data.eval is"
    )
    ungradable: Literal["error", "drop"] = Field(
        default="error",
        description="a row without an answer that responses can be graded against, where they are (data.eval, and "
        "data.train with grpo); drops are counted",
    )

    @property
    def sources(self) -> dict[str, tuple[DataSource, ...]]:
        """Every list of sources, by the name of its setting."""
        return {"train": self.train, "eval": self.eval, "validation": self.validation}


Thinking = Literal["prefix", "empty", "off"]


class PromptSettings(Settings):
    """How a problem becomes the student's and the teacher's prompt."""

    template: Literal["chat", "plain"] = Field(
        default="chat", description="the tokenizer's chat template, or plain text"
    )
    thinking: Thinking = Field(
        default="off",
        description="of both roles; prefix: open a thinking block in the target language; empty: a closed empty "
        "block; off: none",
    )
    student_thinking: Thinking | None = Field(default=None, description="of the student; null: as thinking")
    teacher_thinking: Thinking | None = Field(default=None, description="of the teacher; null: as thinking")
    date: str | None = Field(
        default=None,
        min_length=1,
        description="given to the chat template as date_string, e.g. 26 Jul 2024 for Llama 3, whose would be today's",
    )
    include_problem_en: bool | None = Field(
        default=None, description="show the teacher the English problem; null: unless the objective is opsd"
    )
    include_solution: bool = Field(default=True, description="show the teacher the English solution")
    max_student_tokens: PositiveInt = Field(default=1024, description="longest student prompt")
    max_teacher_tokens: PositiveInt = Field(default=4096, description="longest teacher prompt")
    overlong: Literal["error", "drop"] = Field(
        default="drop", description="what happens to a longer prompt; drops are counted"
    )

    def thinking_of(self, view: View) -> tuple[Thinking, str]:
        """Return how a role's prompt ends, and the setting that says so."""
        own = self.student_thinking if view == "student" else self.teacher_thinking
        return (self.thinking, "prompt.thinking") if own is None else (own, f"prompt.{view}_thinking")


def makes_teacher_prompts(config: Config) -> bool:
    """Whether any step has the teacher's prompts: a pass of the teacher, or a source that is trained on them."""
    return config.method.uses_teacher or any(source.view == "teacher" for source in config.data.train)


def problems(config: Config) -> list[Problem]:
    """Return what is wrong with these sections in the light of the others, and sources that are not there."""
    found = _prompt_problems(config)
    for i, source in enumerate(config.data.train):
        if source.view == "teacher" and config.method.samples_responses:
            rule = f"objective.name = {config.method.name} gives every problem both views"
            found.append(Problem(f"data.train.{i}.view", source.view, rule, "Remove it, or train with sft."))
        if source.layout == "subsets" and config.method.samples_responses:
            rule = f"its rows are responses, and objective.name = {config.method.name} samples its own"
            found.append(Problem(f"data.train.{i}.layout", source.layout, rule, "Train with sft."))
        if len(config.data.train) == 1 and source.weight != "rows":
            found += without_effect(f"data.train.{i}", source, ["weight"], "with no other source to weigh against")
    weights = [source.weight for source in config.data.train]
    if "rows" in weights and not all(weight == "rows" for weight in weights):
        rule = (
            "one source counts its rows, and another has a number of its own: their shares would have nothing in common"
        )
        found.append(Problem("data.train (weight)", weights, rule, "Set weight: rows for all, or numbers."))
    for i, source in enumerate(config.data.eval):
        found += without_effect(f"data.eval.{i}", source, ["weight", "view"], "on a held-out source")
        if source.layout == "subsets":
            rule = "held-out problems are graded, and these rows have no answers"
            found.append(Problem(f"data.eval.{i}.layout", source.layout, rule, "Give problems with answers."))
    if config.data.validation and config.method.samples_responses:
        named = ", ".join(source.label for source in config.data.validation)
        rule = f"the loss of responses of the data is not what objective.name = {config.method.name} lowers"
        found.append(Problem("data.validation", named, rule, "Remove it, or train with sft."))
    labels: dict[str, str] = {}
    for section, held_out in (("eval", config.data.eval), ("validation", config.data.validation)):
        for i, source in enumerate(held_out):
            if source.label in labels:
                rule = f"another held-out source, {labels[source.label]}, has this name too"
                found.append(Problem(f"data.{section}.{i}.name", source.label, rule, "Give each a name of its own."))
            labels[source.label] = f"data.{section}.{i}"
    for i, source in enumerate(config.data.validation):
        found += without_effect(f"data.validation.{i}", source, ["weight"], "on a held-out source")
    if config.data.ungradable == "drop" and not (config.data.eval or config.method.grades_responses):
        rule = f"has no effect: nothing is graded without data.eval and with objective.name = {config.method.name}"
        found.append(Problem("data.ungradable", "drop", rule, "Remove it."))
    for section, sources in config.data.sources.items():
        for i, source in enumerate(sources):
            found += _source_problems(f"data.{section}.{i}", source)
    return found


def _prompt_problems(config: Config) -> list[Problem]:
    found: list[Problem] = []
    prompt, method = config.prompt, config.method
    thinking = {
        "prompt.thinking": prompt.thinking,
        "prompt.student_thinking": prompt.student_thinking,
        "prompt.teacher_thinking": prompt.teacher_thinking,
        "eval.thinking": config.eval.thinking,
    }
    for setting, value in thinking.items():
        if prompt.template == "plain" and value not in (None, "off"):
            rule = "a plain prompt has no thinking block"
            found.append(Problem(setting, value, rule, "Set off, or template: chat."))
    if None not in (prompt.student_thinking, prompt.teacher_thinking):
        rule = "with student_thinking and teacher_thinking, which are all roles there are"
        found += without_effect("prompt", prompt, ["thinking"], rule)
    if prompt.template == "plain" and prompt.date is not None:
        found.append(Problem("prompt.date", prompt.date, "a plain prompt shows no date", "Remove it."))
    if not makes_teacher_prompts(config):
        rule = f"with objective.name = {method.name}: no teacher's prompt is made"
        names = ["include_problem_en", "include_solution", "max_teacher_tokens", "teacher_thinking"]
        found += without_effect("prompt", prompt, names, rule)
    elif prompt.include_problem_en and not method.shows_problem_en:
        rule = f"objective.name = {method.name} shows the teacher no English problem"
        found.append(Problem("prompt.include_problem_en", True, rule, "Remove it, or train with copsd."))
    return found


def _source_problems(name: str, source: DataSource) -> Iterator[Problem]:
    if source.layout == "subsets":
        why = "with layout = subsets, whose rows belong together"
        yield from without_effect(name, source, ["first", "count", "view"], why)
    else:
        yield from without_effect(name, source, ["subsets"], f"with layout = {source.layout}")
    for field in ("path", "english", "solutions"):
        value = getattr(source, field)
        if value is not None and PurePath(value).suffix.lower() in _FILE_SUFFIXES and (rule := why_no_file(value)):
            yield Problem(f"{name}.{field}", value, rule, "Paths start at the current directory.")
    unknown = language_problem(source.language)
    if unknown:
        yield Problem(f"{name}.language", source.language, *unknown)
