"""Which samples a data-parallel rank trains on, and how each view's are grouped into microbatches.

Student and teacher are grouped separately, because their sequences differ in length, but a sample's rank is the same
for both: the teacher's hidden states stay on the rank that needs them. Nothing here changes the loss, which is a plain
sum over response rows (``batching.row_weights``).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_copsd.config.schema import OptimizerSettings
from megatron_copsd.types import Sample, View

Group = tuple[Sample, ...]
Length = Callable[[Sample], int]
Cut = Callable[[Sequence[Sample], Length, int], list[Group]]

# A student token goes forward and backward, which costs twice as much; a teacher token goes forward only.
_STUDENT_PASSES = 3


@dataclass(frozen=True)
class Grouping:
    """How large a microbatch of one view may be.

    Attributes:
        max_sequences: its sequences, where ``max_tokens`` is None.
        max_tokens: its tokens, padding included. A sequence that is longer makes a microbatch by itself.
        packed: sequences lie behind each other; else each is padded to the longest.
    """

    max_sequences: int
    max_tokens: int | None
    packed: bool


def grouping(settings: OptimizerSettings, view: View) -> Grouping:
    """Return how a view's microbatches are made; what is not set for the teacher is as for the student."""
    student = Grouping(settings.micro_batch_size, settings.micro_batch_tokens, settings.packing)
    if view == "student":
        return student
    if settings.teacher_micro_batch_tokens is not None:
        return Grouping(student.max_sequences, settings.teacher_micro_batch_tokens, settings.packing)
    if settings.teacher_micro_batch_size is not None:
        return Grouping(settings.teacher_micro_batch_size, None, settings.packing)
    return student


def sequence_length(sample: Sample, view: View) -> int:
    """Return the tokens of a sample's sequence, prompt and response."""
    prompt = sample.pair.student_prompt if view == "student" else sample.pair.teacher_prompt
    return len(prompt) + len(sample.rollout.response)


def share_samples(samples: Sequence[Sample], ranks: int, *, by_tokens: bool, with_teacher: bool) -> list[list[Sample]]:
    """Give every sample a data-parallel rank.

    Args:
        samples: the whole global batch, the same on every rank.
        ranks: data-parallel size.
        by_tokens: balance the work of the ranks; else rank r takes samples r, r + ranks, r + 2 ranks, ...
        with_teacher: whether the teacher's pass is part of that work.

    Returns:
        The samples of each rank, in the order of ``samples``.
    """
    if not by_tokens:
        return [list(samples[rank::ranks]) for rank in range(ranks)]

    def work(sample: Sample) -> int:
        student = _STUDENT_PASSES * sequence_length(sample, "student")
        return student + sequence_length(sample, "teacher") if with_teacher else student

    return [list(part) for part in spread(samples, work, ranks)]


def group_samples(
    shares: Sequence[Sequence[Sample]], view: View, rule: Grouping, count_multiple: int = 1
) -> list[list[Group]]:
    """Group each rank's samples into microbatches of one view.

    Every rank gets the same number, because pipeline schedules and collectives count on it; where samples run out,
    the last ones are short or empty. By tokens, it is the smallest number with which every rank keeps to the limit.

    Args:
        shares: samples of each rank.
        view: whose sequences the microbatches hold.
        rule: how large a microbatch may be.
        count_multiple: their number is rounded up to a multiple of it (interleaving needs that).

    Returns:
        For each rank its microbatches, at least one; an empty tuple is an empty microbatch.
    """
    if rule.max_tokens is None:
        count = _round_up(max(-(-max(map(len, shares)) // rule.max_sequences), 1), count_multiple)
        starts = range(0, count * rule.max_sequences, rule.max_sequences)
        return [[tuple(own[start : start + rule.max_sequences]) for start in starts] for own in shares]
    cut = spread if rule.packed else _runs
    size = partial(sequence_length, view=view)
    count = _round_up(max(_fewest(own, size, rule, cut) for own in shares), count_multiple)
    return [cut(own, size, count) for own in shares]


def spread(samples: Sequence[Sample], size: Length, bins: int) -> list[Group]:
    """Spread samples so that the bins' sums of sizes are nearly equal: the next largest goes to the emptiest bin.

    The fullest bin has at most 4/3 of what it must have (R. L. Graham, "Bounds on multiprocessing timing anomalies",
    1969, longest processing time first).

    Returns:
        The samples of each bin, by ``Sample.index``; a bin may be empty.
    """
    filled: list[list[Sample]] = [[] for _ in range(bins)]
    emptiest = [(0, number) for number in range(bins)]
    for sample in sorted(samples, key=lambda sample: (-size(sample), sample.index)):
        total, number = emptiest[0]
        filled[number].append(sample)
        heapq.heapreplace(emptiest, (total + size(sample), number))
    return [tuple(sorted(members, key=lambda sample: sample.index)) for members in filled]


def _runs(samples: Sequence[Sample], size: Length, bins: int) -> list[Group]:
    """Cut samples, sorted by size, into at most ``bins`` runs so that the largest padded run is as small as possible.

    Sequences of like length share a microbatch, so that little is padded.
    """
    ordered = sorted(samples, key=lambda sample: (-size(sample), sample.index))
    low, high = 0, len(ordered) * max(map(size, ordered), default=0)
    while low < high:  # the smallest limit that needs no more than the bins
        middle = (low + high) // 2
        low, high = (low, middle) if len(_fill(ordered, size, middle)) <= bins else (middle + 1, high)
    runs = _fill(ordered, size, high)
    return runs + [()] * (bins - len(runs))


def _fill(ordered: Sequence[Sample], size: Length, limit: int) -> list[Group]:
    """Cut samples, longest first, into runs whose padded tokens keep to the limit; a run has one sample at least."""
    runs: list[list[Sample]] = []
    for sample in ordered:
        if runs and (len(runs[-1]) + 1) * size(runs[-1][0]) <= limit:
            runs[-1].append(sample)
        else:
            runs.append([sample])
    return [tuple(run) for run in runs]


def _fewest(samples: Sequence[Sample], size: Length, rule: Grouping, cut: Cut) -> int:
    """Return the smallest number of microbatches that keep to ``rule.max_tokens``."""
    limit = rule.max_tokens
    assert limit is not None

    def fits(part: Group) -> bool:
        sizes = [size(sample) for sample in part]
        return len(part) < 2 or (sum(sizes) if rule.packed else len(sizes) * max(sizes)) <= limit

    # A sample longer than the limit fills one microbatch, not several.
    count = max(-(-sum(min(size(sample), limit) for sample in samples) // limit), 1)
    while not all(map(fits, cut(samples, size, count))):
        count += 1
    return count


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
