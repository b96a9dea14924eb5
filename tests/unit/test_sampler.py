"""The order of training: shares, epochs, resuming, and independence from everything but seed and step."""

import pytest

from megatron_copsd.data.sampler import ProblemSampler


def stream(sizes, weights, seed=0, steps=50, n=8) -> list[tuple[int, int]]:
    sampler = ProblemSampler(sizes, weights, seed)
    return [draw for step in range(steps) for draw in sampler.take(step, n)]


@pytest.mark.parametrize("size", [1, 7, 8, 33])
def test_every_row_comes_once_an_epoch_and_epochs_differ(size: int) -> None:
    rows = [row for _, row in stream([size], [2.5])]
    epochs = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size >= 7:
        assert len(set(map(tuple, epochs))) > 1
        assert epochs[0] != list(range(size))


@pytest.mark.parametrize(
    "weights",
    [[1, 1], [3, 1], [0.1, 0.2, 0.7], [1, 1, 1], [0.001, 1, 1],
     [5, 3, 2, 1, 1, 1], [1 / 3, 0.123456789, 7.7, 2, 0.01]],
)  # fmt: skip
def test_shares_hold_after_every_single_draw(weights: list[float]) -> None:
    bound = 1 - 1 / (2 * len(weights) - 2) + 1e-6
    counts = [0] * len(weights)
    for position, (source, _) in enumerate(stream([5] * len(weights), weights, steps=500), start=1):
        counts[source] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - position * weight / sum(weights)) <= bound


def test_integer_shares_are_met_exactly() -> None:
    draws = stream([100, 100, 100], [5, 2, 1], steps=10, n=8)
    assert [sum(source == k for source, _ in draws) for k in range(3)] == [50, 20, 10]


def test_each_source_runs_through_its_own_epochs() -> None:
    draws = stream([4, 10], [3, 1], steps=20, n=8)
    small = [row for source, row in draws if source == 0]
    assert all(sorted(small[start : start + 4]) == [0, 1, 2, 3] for start in range(0, len(small), 4))
    large = [row for source, row in draws if source == 1]
    assert sorted(large[:10]) == sorted(large[10:20]) == list(range(10))


def test_a_step_depends_on_nothing_but_seed_and_step() -> None:
    straight = ProblemSampler([7, 20], [1, 2], seed=3)
    steps = [straight.take(step, 5) for step in range(40)]
    assert ProblemSampler([7, 20], [1, 2], seed=3).take(31, 5) == steps[31]
    assert straight.take(2, 5) == steps[2]
    assert straight.take(17, 5) == steps[17]
    assert straight.take(17, 5) == steps[17]
    # The same stream, cut differently.
    assert ProblemSampler([7, 20], [1, 2], seed=3).take(1, 20) == [draw for step in steps[4:8] for draw in step]


def test_the_order_is_the_same_on_every_machine() -> None:
    pinned = [(0, 4), (1, 1), (0, 3), (0, 0), (1, 2), (0, 1), (0, 2), (1, 0), (0, 2)]
    assert stream([5, 3], [2, 1], seed=11, steps=1, n=9) == pinned


def test_seeds_and_sources_have_orders_of_their_own() -> None:
    assert stream([50], [1], seed=0) != stream([50], [1], seed=1)
    draws = stream([50, 50], [1, 1], steps=25)
    first, second = ([row for source, row in draws if source == k] for k in (0, 1))
    assert first != second
