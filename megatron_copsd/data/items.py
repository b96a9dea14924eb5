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

from megatron_copsd.config.schema import Config, DataSource
from megatron_copsd.data.problems import Ungraded, load_problems
from megatron_copsd.data.prompts import PromptBuilder
from megatron_copsd.data.supervised import ReferenceBuilder
from megatron_copsd.errors import UserError, describe
from megatron_copsd.types import Problem, PromptPair, Rollout

Item = TypeVar("Item")
TrainItem = tuple[PromptPair, Rollout | None]
"""A problem's prompts and, when training is supervised, its reference response."""


@dataclass(frozen=True)
class Items:
    """What a run draws from.

    Attributes:
        train: items by source and row.
        held_out: prompts of the held-out sources by label.

    Where no teacher reads a problem, in evaluation and with a method that has none, the teacher's prompt repeats the
    student's, and the data need no privileged context.
    """

    train: tuple[tuple[TrainItem, ...], ...]
    held_out: Mapping[str, tuple[PromptPair, ...]]


def load_items(config: Config, tokenizer: PreTrainedTokenizerBase, *, show: bool) -> Items:
    """Read every source and make its prompts; ``show`` prints what was read and dropped.

    Raises:
        UserError: a source is malformed, or nothing of it is left.
    """
    builder = PromptBuilder(tokenizer, config.shown_prompt)
    references = None
    if not config.method.samples_responses:
        references = ReferenceBuilder(tokenizer, config.prompt, config.rollout.max_response_tokens)

    ungraded = config.data.ungradable if config.method.grades_responses else "keep"

    def train_item(source: DataSource, problem: Problem) -> TrainItem | None:
        read_by_teacher = config.method.uses_teacher or source.view == "teacher"
        pair = builder.pair(problem) if read_by_teacher else _student_alone(builder, problem)
        if pair is None:
            return None
        if references is None:
            return pair, None
        if source.view == "teacher":
            pair = dataclasses.replace(pair, student_prompt=pair.teacher_prompt)
        reference = references.rollout(problem)
        return None if reference is None else (pair, reference)

    train = tuple(
        _source_items(source, f"data.train.{i}", ungraded, partial(train_item, source), show)
        for i, source in enumerate(config.data.train)
    )
    held_out = load_held_out(config, tokenizer, show=show)
    trained_on = {pair.problem.problem for items in train for pair, _ in items}
    for label, pairs in held_out.items():
        if seen := sum(pair.problem.problem in trained_on for pair in pairs):
            _console(show).print(f"{label}: {seen} of {len(pairs)} held-out problems are trained on, too")
    return Items(train, held_out)


def load_held_out(
    config: Config, tokenizer: PreTrainedTokenizerBase, *, show: bool
) -> dict[str, tuple[PromptPair, ...]]:
    """Read the held-out sources alone; ``show`` prints what was read and dropped.

    Raises:
        UserError: as ``load_items``.
    """
    held_out = partial(_student_alone, PromptBuilder(tokenizer, config.prompt))
    return {
        source.label: _source_items(source, f"data.eval.{i}", config.data.ungradable, held_out, show)
        for i, source in enumerate(config.data.eval)
    }


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
