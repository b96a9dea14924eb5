"""Means over a step's responses."""

from __future__ import annotations

import pytest

from megatron_copsd.measure.reports import rollout_metrics
from megatron_copsd.types import Problem, PromptPair, Rollout, Sample, VersionSpan

PAIR = PromptPair(Problem("p", "sw", "?"), (1,), (1,))


def sample(*spans: VersionSpan) -> Sample:
    return Sample(PAIR, Rollout((7,) * 4, (0.0,) * 4, "stop", weight_version=5, text="", versions=spans), 0)


def test_staleness_counts_the_tokens_of_each_version():
    assert rollout_metrics([sample()], 6)["staleness"] == 1
    assert rollout_metrics([sample(VersionSpan(5, 0, 4))], 5)["staleness"] == 0
    interrupted = sample(VersionSpan(4, 0, 1), VersionSpan(5, 1, 4))
    assert rollout_metrics([interrupted], 5)["staleness"] == pytest.approx(1 / 4)
    assert rollout_metrics([interrupted, sample(VersionSpan(5, 0, 4))], 5)["staleness"] == pytest.approx(1 / 8)
