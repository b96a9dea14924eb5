"""Accuracy of an engine's current weights on held-out problems."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_copsd.evaluate.metrics import AccuracyReport, accuracy_report
from megatron_copsd.rollout.collect import rollout_seed
from megatron_copsd.rollout.engine import Request, RolloutEngine, Sampling
from megatron_copsd.types import PromptPair


def evaluate_source(
    engine: RolloutEngine, pairs: Sequence[PromptPair], sampling: Sampling, samples: int, seed: int
) -> AccuracyReport:
    """Sample and grade ``samples`` responses of every problem.

    Collectives: spreads the requests over the world and gathers the responses.
    """
    requests = [
        Request(pair.student_prompt, rollout_seed(seed, -1, index * samples + j))
        for index, pair in enumerate(pairs)
        for j in range(samples)
    ]
    engine.begin(requests, sampling)
    assert engine.weight_version is not None, "evaluation before the first weight sync"
    rollouts = engine.finish(engine.weight_version)
    answers = [pair.problem.answer for pair in pairs]
    texts = [[rollout.text for rollout in rollouts[i : i + samples]] for i in range(0, len(rollouts), samples)]
    return accuracy_report(texts, answers)
