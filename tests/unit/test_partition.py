"""Which rank and which microbatch a sample goes to: balanced, within the limits, the same wherever it is asked."""

from __future__ import annotations

import random
from functools import partial

import pytest

from megatron_copsd.config.schema import OptimizerSettings
from megatron_copsd.data.batches.partition import (
    Group,
    Grouping,
    group_samples,
    grouping,
    sequence_length,
    share_samples,
    spread,
)
from megatron_copsd.types import Problem, PromptPair, Rollout, Sample

STUDENT = partial(sequence_length, view="student")
TEACHER = partial(sequence_length, view="teacher")


def make_samples(count: int, seed: int = 0) -> list[Sample]:
    """Lengths spread as those of worked solutions: many short ones, a few very long ones."""
    draw = random.Random(seed)
    samples = []
    for index in range(count):
        student, response = draw.randint(5, 60), min(4 + int(draw.expovariate(1 / 80)), 600)
        pair = PromptPair(Problem(f"x:{index}", "SWA", "?"), (1,) * student, (1,) * (student + draw.randint(50, 200)))
        samples.append(Sample(pair, Rollout((2,) * response, (0.0,) * response, "stop", 0, ""), index))
    return samples


def padded(part: Group) -> int:
    return len(part) * max(map(STUDENT, part), default=0)


def total(part: Group) -> int:
    return sum(map(STUDENT, part))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 64])
@pytest.mark.parametrize("max_tokens", [10, 700, 4000])
def test_every_sample_once_within_the_limit(packed: bool, ranks: int, count: int, max_tokens: int) -> None:
    samples = make_samples(count)
    shares = share_samples(samples, ranks, by_tokens=True, with_teacher=True)
    groups = group_samples(shares, "student", Grouping(1, max_tokens, packed))
    assert len({len(own) for own in groups}) == 1
    assert len(groups[0]) >= 1
    for own, part in zip(shares, groups, strict=True):
        assert sorted(s.index for microbatch in part for s in microbatch) == [s.index for s in own]
    assert sorted(s.index for own in shares for s in own) == list(range(count))
    size = total if packed else padded
    assert all(size(part) <= max_tokens for own in groups for part in own if len(part) > 1)


def test_packed_microbatches_are_full_and_equal() -> None:
    samples = make_samples(64)
    (groups,) = group_samples([samples], "student", Grouping(1, 1500, True))
    assert len(groups) == -(-sum(map(STUDENT, samples)) // 1500)
    totals = [total(part) for part in groups]
    assert max(totals) < 1.05 * min(totals)


def test_padded_microbatches_have_sequences_of_like_length() -> None:
    samples = make_samples(64)
    (by_tokens,) = group_samples([samples], "student", Grouping(1, 1500, False))
    (by_count,) = group_samples([samples], "student", Grouping(-(-64 // len(by_tokens)), None, False))
    assert len(by_tokens) <= len(by_count)
    assert sum(map(padded, by_tokens)) < 0.65 * sum(map(padded, by_count))
    assert max(map(padded, by_tokens)) < 0.8 * max(map(padded, by_count))


def test_ranks_have_equal_work() -> None:
    samples = make_samples(64)

    def work(own: list[Sample]) -> int:
        return sum(3 * STUDENT(s) + TEACHER(s) for s in own)

    balanced = [work(own) for own in share_samples(samples, 8, by_tokens=True, with_teacher=True)]
    strided = [work(own) for own in share_samples(samples, 8, by_tokens=False, with_teacher=True)]
    mean = sum(balanced) / 8
    assert max(balanced) < 1.05 * mean
    assert max(strided) > 1.25 * mean


def test_longest_first_keeps_to_its_bound() -> None:
    # Graham's example: 9 against 11 = (4/3 - 1/9) * 9.
    samples = [s for s, size in zip(make_samples(7), (5, 5, 4, 4, 3, 3, 3), strict=True) for s in [resized(s, size)]]
    assert sorted(total(part) for part in spread(samples, STUDENT, 3)) == [8, 8, 11]


def resized(sample: Sample, size: int) -> Sample:
    pair = PromptPair(sample.pair.problem, (1,), (1,))
    return Sample(pair, Rollout((2,) * (size - 1), (0.0,) * (size - 1), "stop", 0, ""), sample.index)


def test_order_of_the_samples_does_not_matter() -> None:
    samples = make_samples(40)
    for packed in (False, True):
        rule = Grouping(1, 900, packed)
        straight = group_samples(share_samples(samples, 3, by_tokens=True, with_teacher=False), "teacher", rule)
        reversed_ = group_samples(share_samples(samples[::-1], 3, by_tokens=True, with_teacher=False), "teacher", rule)
        assert straight == reversed_


def test_a_rank_without_samples_has_an_empty_microbatch() -> None:
    shares = share_samples(make_samples(1), 3, by_tokens=False, with_teacher=True)
    assert group_samples(shares, "student", Grouping(4, None, False))[2] == [()]
    assert group_samples(shares, "student", Grouping(4, 100, True))[2] == [()]


def test_what_is_not_set_for_the_teacher_is_as_for_the_student() -> None:
    def both(**changes: object) -> tuple[Grouping, Grouping]:
        settings = OptimizerSettings(**changes)
        return grouping(settings, "student"), grouping(settings, "teacher")

    assert both(micro_batch_size=3) == (Grouping(3, None, False), Grouping(3, None, False))
    assert both(micro_batch_tokens=99) == (Grouping(4, 99, False), Grouping(4, 99, False))
    assert both(teacher_micro_batch_size=16, packing=True) == (Grouping(4, None, True), Grouping(16, None, True))
    assert both(micro_batch_tokens=9, teacher_micro_batch_size=16) == (Grouping(4, 9, False), Grouping(16, None, False))
    assert both(teacher_micro_batch_tokens=999) == (Grouping(4, None, False), Grouping(4, 999, False))


@pytest.mark.parametrize(("samples", "multiple", "expected"), [(7, 2, 4), (7, 3, 3), (7, 4, 4), (0, 2, 2), (6, 2, 2)])
def test_empty_microbatches_fill_the_last_round(samples: int, multiple: int, expected: int) -> None:
    for rule in (Grouping(3, None, False), Grouping(1, 10_000, False), Grouping(1, 10_000, True)):
        (groups,) = group_samples([make_samples(samples)], "student", rule, count_multiple=multiple)
        assert len(groups) == (expected if rule.max_tokens is None else multiple)
        assert sorted(sample.index for part in groups for sample in part) == list(range(samples))
