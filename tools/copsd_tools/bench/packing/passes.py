"""Both passes over a step's samples, timed under each way of making microbatches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from rich.table import Column, Table

from megatron_copsd import platform
from megatron_copsd.config.schema import Config
from megatron_copsd.data.batches.partition import sequence_length
from megatron_copsd.types import Microbatch, Sample, View

with platform.importing_megatron():
    from megatron_copsd.measure.reports import reduce_reports
    from megatron_copsd.run import Run, assemble
    from megatron_copsd.train import learn, make_samples, microbatches, teach

VIEWS: tuple[View, ...] = ("teacher", "student")


@dataclass(frozen=True)
class PackingSpeed:
    """One line of results.

    Attributes:
        model, dtype: of the run.
        grouping: how microbatches are made.
        samples, response_tokens: of the step.
        teacher_microbatches, student_microbatches: how many there are.
        teacher_padding, student_padding: share of the tokens computed that are padding.
        teacher_seconds, student_seconds: of the pass, median of the repeats; the student's has loss and backward.
        seconds_ratio: both passes, over those of the first line.
        loss: of the step; no grouping changes it.
    """

    model: str
    dtype: str
    grouping: str
    samples: int
    response_tokens: int
    teacher_microbatches: int
    student_microbatches: int
    teacher_padding: float
    student_padding: float
    teacher_seconds: float
    student_seconds: float
    seconds_ratio: float
    loss: float


def bench_packing(config: Config, repeats: int) -> list[PackingSpeed]:
    """Sample one step's responses, then time both passes under each grouping in turn, repeat by repeat.

    By tokens, a view's microbatches get as many as the largest of those by count has, so that all take the same memory;
    or what the configuration sets.

    Raises:
        UserError: data or model do not fit the settings, or a server fails.
    """
    run = assemble(config)
    try:
        samples = make_samples(run, 0)
    finally:
        run.engine.close()
    runs = _groupings(run, samples)
    batches = {name: {view: microbatches(way, samples, view) for view in VIEWS} for name, way in runs.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    losses: dict[str, float] = {}
    for repeat in range(-1, repeats):
        for name, way in runs.items():
            teacher, student, losses[name] = _timed_passes(way, batches[name], samples)
            if repeat >= 0:  # the first is a warm-up
                seconds[name].append((teacher, student))
    platform.stop()

    lines: list[PackingSpeed] = []
    for name, of_views in batches.items():
        teacher, student = (median(times) for times in zip(*seconds[name], strict=True))
        first = lines[0].teacher_seconds + lines[0].student_seconds if lines else teacher + student
        lines.append(
            PackingSpeed(
                model=config.model.path,
                dtype=config.model.dtype,
                grouping=name,
                samples=len(samples),
                response_tokens=sum(len(sample.rollout.response) for sample in samples),
                teacher_microbatches=len(of_views["teacher"]),
                student_microbatches=len(of_views["student"]),
                teacher_padding=_padding(of_views["teacher"], samples, "teacher"),
                student_padding=_padding(of_views["student"], samples, "student"),
                teacher_seconds=teacher,
                student_seconds=student,
                seconds_ratio=(teacher + student) / first,
                loss=losses[name],
            )
        )
    return lines


def packing_table(lines: Sequence[PackingSpeed]) -> Table:
    """The results for the terminal."""
    first = lines[0]
    title = f"{first.model}, {first.dtype}: {first.samples} responses, {first.response_tokens} tokens"
    table = Table(
        Column("grouping", no_wrap=True), "number", "padding", "teacher s", "student s", "both", "loss", title=title
    )
    for line in lines:
        table.add_row(
            line.grouping,
            f"{line.teacher_microbatches} + {line.student_microbatches}",
            f"{line.teacher_padding:.0%} + {line.student_padding:.0%}",
            f"{line.teacher_seconds:.2f}",
            f"{line.student_seconds:.2f}",
            f"{line.seconds_ratio:.3f}",
            f"{line.loss:.7f}",
        )
    return table


def _groupings(run: Run, samples: Sequence[Sample]) -> dict[str, Run]:
    """The run under each way of making microbatches."""

    def under(**changes: Any) -> Run:
        optimizer = run.config.optimizer.model_copy(update=changes)
        return replace(run, config=run.config.model_copy(update={"optimizer": optimizer}))

    settings = run.config.optimizer
    by_count = under(micro_batch_tokens=None, teacher_micro_batch_tokens=None, packing=False)
    largest = {view: max(batch.tokens.numel() for batch in microbatches(by_count, samples, view)) for view in VIEWS}
    limits = {
        "micro_batch_tokens": settings.micro_batch_tokens or largest["student"],
        "teacher_micro_batch_tokens": settings.teacher_micro_batch_tokens or largest["teacher"],
    }
    return {
        "padded, by count": by_count,
        "padded, by tokens": under(**limits, packing=False),
        "packed, by tokens": under(**limits, packing=True),
    }


def _timed_passes(
    run: Run, batches: dict[View, list[Microbatch]], samples: Sequence[Sample]
) -> tuple[float, float, float]:
    """Seconds of the teacher's pass and of the student's, and the loss."""
    with run.teacher.in_model():
        teacher_seconds, rows = _timed(lambda: teach(run, batches["teacher"]))
        weight = run.teacher.output_weight()
    student_seconds, reports = _timed(lambda: learn(run, samples, batches["student"], rows, weight))
    num_tokens = sum(len(sample.rollout.response) for sample in samples)
    return teacher_seconds, student_seconds, reduce_reports(run.model.layout, reports, num_tokens)[0]


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _padding(batches: Sequence[Microbatch], samples: Sequence[Sample], view: View) -> float:
    computed = sum(batch.tokens.numel() for batch in batches)
    return 1 - sum(sequence_length(sample, view) for sample in samples) / computed
