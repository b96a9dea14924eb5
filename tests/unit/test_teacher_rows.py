"""The teacher's rows are found again by sample, however both views are grouped."""

from __future__ import annotations

import pytest
import torch
from samples import SAMPLES, TOTAL

from megatron_copsd.config.schema import TeacherSettings
from megatron_copsd.data.batches.batching import microbatch
from megatron_copsd.data.batches.context import cut_for_context, sequence_multiple
from megatron_copsd.model.teacher import TeacherRows
from megatron_copsd.types import Microbatch, Sample, View

HIDDEN = 3


def batch(samples: list[Sample], view: View, size: int = 1) -> Microbatch:
    multiple = sequence_multiple(size)
    return microbatch(samples, view, 0, (1.0,) * len(samples), multiple, False, multiple)


def rows_of(samples: list[Sample]) -> torch.Tensor:
    """[R, H]: a row says of which sample and of which of its tokens it is."""
    pairs = [(s.index, n) for s in samples for n in range(len(s.rollout.response))]
    return torch.tensor([(index, n, 7.0) for index, n in pairs]).view(-1, HIDDEN)


@pytest.mark.parametrize("budget", [0.0, 100.0, float("inf")])
def test_other_groups_in_another_order(budget: float) -> None:
    store = TeacherRows(budget)
    for group in (SAMPLES[:4], [], SAMPLES[4:]):
        store.put(batch(group, "teacher"), rows_of(group))
    for group in ([SAMPLES[5], SAMPLES[1]], [SAMPLES[0]], [], [SAMPLES[i] for i in (6, 2, 3, 4)], []):
        hidden = torch.zeros_like(rows_of(group))
        assert torch.equal(store.take(batch(group, "student"), hidden), rows_of(group))
    with pytest.raises(KeyError):
        store.take(batch([SAMPLES[0]], "student"), torch.zeros(5, HIDDEN))


def test_a_context_rank_takes_the_rows_it_has() -> None:
    seen = []
    for rank in range(2):
        store = TeacherRows(0)
        store.put(batch(SAMPLES, "teacher"), rows_of(SAMPLES))
        part = cut_for_context(batch(SAMPLES, "student", 2), rank, 2)
        taken = store.take(part, torch.zeros(len(part.labels), HIDDEN))
        assert torch.equal(taken, rows_of(SAMPLES)[part.row_numbers])
        seen += part.row_numbers.tolist()
    assert sorted(seen) == list(range(TOTAL))


def test_budgets() -> None:
    bytes_of = {
        cache: TeacherSettings(cache=cache, cache_mb=5).device_cache_bytes for cache in ("device", "host", "auto")
    }
    assert bytes_of == {"device": float("inf"), "host": 0, "auto": 5 * 2**20}
