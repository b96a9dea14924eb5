"""All sources of a run, read and tokenised before the first step, so that what is wrong with them shows at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from rich.console import Console
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from megatron_copsd.architecture import Architecture
from megatron_copsd.config.schema import Config, DataSource
from megatron_copsd.config.sections.sglang import KEPT_POSITIONS
from megatron_copsd.data.problems import Ungraded, load_problems
from megatron_copsd.data.prompts import PromptBuilder
from megatron_copsd.data.subsets import TrainItem, Unit, units, weigh
from megatron_copsd.data.supervised import ReferenceBuilder
from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.folder import read_hf_config
from megatron_copsd.hf.read import read_architecture
from megatron_copsd.hf.texts.stops import stop_ids
from megatron_copsd.hf.texts.tokenizer import load_tokenizer
from megatron_copsd.types import Problem, PromptPair, Rollout, View

Item = TypeVar("Item")


@dataclass(frozen=True)
class Items:
    """What a run draws from.

    Attributes:
        train: by source, what one draw gives.
        held_out: prompts of the held-out sources by label.
        validation: items of the sources whose loss is measured, by label.

    Where no teacher reads a problem, in evaluation and with a method that has none, the teacher's prompt repeats the
    student's, and the data need no privileged context.
    """

    train: tuple[tuple[Unit, ...], ...]
    held_out: Mapping[str, tuple[PromptPair, ...]]
    validation: Mapping[str, tuple[TrainItem, ...]]


def load_items(config: Config, tokenizer: PreTrainedTokenizerBase, *, show: bool) -> Items:
    """Read every source and make its prompts; ``show`` prints what was read and dropped.

    Raises:
        UserError: a source is malformed, or nothing of it is left.
    """
    builder, references = _builders(config, tokenizer)
    positions = _Positions(config)

    ungraded = config.data.ungradable if config.method.grades_responses else "keep"

    def train_item(source: DataSource, problem: Problem) -> TrainItem | None:
        read_by_teacher = config.method.uses_teacher or source.view == "teacher"
        pair = builder.pair(problem) if read_by_teacher else _student_alone(builder, problem)
        if pair is None:
            return None
        if references is None:
            positions.check_sampled(pair)
            return pair, None
        if source.view == "teacher":
            pair = dataclasses.replace(pair, student_prompt=pair.teacher_prompt)
        reference = references.rollout(problem)
        if reference is None:
            return None
        positions.check_reference(pair, reference)
        return pair, reference

    def items(section: str, number: int, source: DataSource) -> tuple[TrainItem, ...]:
        return _source_items(source, f"data.{section}.{number}", ungraded, partial(train_item, source), show)

    train = tuple(units(items("train", i, source)) for i, source in enumerate(config.data.train))
    validation = {s.label: items("validation", i, s) for i, s in enumerate(config.data.validation)}
    if config.loss.reduction == "subset_mean":
        train = weigh(config.data.train, train, config.rollout.prompts_per_step)
    held_out = load_held_out(config, tokenizer, show=show)
    trained_on = {pair.problem.problem for found in train for unit in found for pair, _ in unit}
    measured = {label: tuple(pair for pair, _ in found) for label, found in validation.items()}
    for label, pairs in {**held_out, **measured}.items():
        if seen := sum(pair.problem.problem in trained_on for pair in pairs):
            _console(show).print(f"{label}: {seen} of {len(pairs)} held-out problems are trained on, too")
    return Items(train, held_out, validation)


def load_held_out(
    config: Config, tokenizer: PreTrainedTokenizerBase, *, show: bool
) -> dict[str, tuple[PromptPair, ...]]:
    """Read the held-out sources alone; ``show`` prints what was read and dropped.

    Raises:
        UserError: as ``load_items``.
    """
    builder, positions = PromptBuilder(tokenizer, config.evaluation_prompt), _Positions(config)

    def held_out(problem: Problem) -> PromptPair | None:
        pair = _student_alone(builder, problem)
        if pair is not None:
            positions.check_held_out(problem, pair.student_prompt)
        return pair

    return {
        source.label: _source_items(source, f"data.eval.{i}", config.data.ungradable, held_out, show)
        for i, source in enumerate(config.data.eval)
    }


def check_texts(config: Config, architecture: Architecture) -> None:
    """Check what can be checked of tokenizer, chat template, stop ids and lengths without data or weights.

    Raises:
        UserError: the model's files and the settings do not fit each other.
    """
    read_hf_config(config.model.path, config.model.revision)
    tokenizer = load_tokenizer(config.model.path, config.model.revision, architecture.vocab_size)
    stop_ids(config, tokenizer, architecture.vocab_size)
    _builders(config, tokenizer)
    longest = config.rollout.max_response_tokens
    if longest >= architecture.max_positions:
        rule = f"leaves no room for a prompt within the model's {architecture.max_positions} positions"
        remedy = f"Lower it below {architecture.max_positions}."
        raise UserError(describe("rollout.max_response_tokens", longest, rule, remedy))


def _builders(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[PromptBuilder, ReferenceBuilder | None]:
    prompts = PromptBuilder(tokenizer, config.shown_prompt)
    if config.method.samples_responses:
        return prompts, None
    views = {source.view for source in (*config.data.train, *config.data.validation)}
    return prompts, ReferenceBuilder(tokenizer, config.prompt, config.rollout.max_response_tokens, sorted(views))


class _Positions:
    """Holds every sequence to the positions that the model was made for: beyond them it computes, and computes junk."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._positions = read_architecture(config.model.path, config.model.revision).max_positions
        self._sampled = self._positions - (KEPT_POSITIONS if config.rollout.engine == "sglang" else 0)

    def check_sampled(self, pair: PromptPair) -> None:
        """Refuse a problem whose response could end beyond, in the student's view or the teacher's."""
        longest = self._config.rollout.max_response_tokens
        setting = "rollout.max_response_tokens"
        self._check(pair.problem, "student", pair.student_prompt, longest, setting, self._sampled)
        if self._config.method.uses_teacher:
            self._check(pair.problem, "teacher", pair.teacher_prompt, longest, setting, self._positions)

    def check_reference(self, pair: PromptPair, reference: Rollout) -> None:
        """Refuse a problem whose solution ends beyond."""
        length = len(reference.response)
        self._check(pair.problem, "student", pair.student_prompt, length, "tokens of the solution", self._positions)

    def check_held_out(self, problem: Problem, prompt: tuple[int, ...]) -> None:
        """Refuse a held-out problem whose response could end beyond."""
        own, general = self._config.eval.max_response_tokens, self._config.rollout.max_response_tokens
        setting = "eval.max_response_tokens" if own else "rollout.max_response_tokens"
        self._check(problem, "student", prompt, own or general, setting, self._sampled)

    def _check(
        self, problem: Problem, view: View, prompt: tuple[int, ...], longest: int, setting: str, limit: int
    ) -> None:
        if len(prompt) + longest <= limit:
            return
        kept = f" less the {self._positions - limit} that SGLang keeps" if limit < self._positions else ""
        rule = f"the prompt with {longest} ({setting}) exceeds the model's {self._positions} positions{kept}"
        remedy = f"Lower prompt.max_{view}_tokens to {max(limit - longest, 1)}, or allow shorter responses."
        raise UserError(describe(problem.id, f"{len(prompt)} tokens", rule, remedy))


def _student_alone(builder: PromptBuilder, problem: Problem) -> PromptPair | None:
    """The prompts of a problem that no teacher reads: the student's, twice."""
    prompt = builder.student_prompt(problem)
    return None if prompt is None else PromptPair(problem, prompt, prompt)


def _source_items(
    source: DataSource, where: str, ungraded: Ungraded, make: Callable[[Problem], Item | None], show: bool
) -> tuple[Item, ...]:
    console = _console(show)
    problems = load_problems(source, where, ungraded)
    for note in problems.notes():
        console.print(note)
    bar = track(problems.problems, f"prompts of {source.label}", console=console, disable=not console.is_terminal)
    items = tuple(item for item in map(make, bar) if item is not None)
    if len(items) < len(problems.problems):
        dropped = len(problems.problems) - len(items)
        console.print(f"{source.path}: {dropped} problems dropped: prompt or response over its limit")
    if not items:
        remedy = "Raise prompt.max_student_tokens, prompt.max_teacher_tokens or rollout.max_response_tokens."
        raise UserError(describe(f"{where}.path", source.path, "every prompt is over its limit", remedy))
    return items


def _console(show: bool) -> Console:
    return Console(quiet=not show, markup=False, highlight=False, soft_wrap=True)
