"""What the last stages of all replicas report, brought together on every process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist

from megatron_copsd.measure.throughput import count_flops, throughput_metrics
from megatron_copsd.methods.base import RowReport
from megatron_copsd.model.parallel import Layout
from megatron_copsd.run import Run
from megatron_copsd.types import Sample, StepResult


def reduce_reports(layout: Layout, reports: Sequence[RowReport], num_tokens: int) -> tuple[float, dict[str, float]]:
    """Return the global loss and the means over all response rows, the same on every rank.

    Collectives: one all-gather of a few numbers over the world.
    """
    own = [(float(r.loss), {name: float(value) for name, value in r.row_sums.items()}) for r in reports]
    everywhere: list[list[tuple[float, dict[str, float]]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, own if layout.reports else [])
    flat = [report for reports in everywhere for report in reports]
    means: dict[str, float] = {}
    for _, sums in flat:
        for name, value in sums.items():
            means[name] = means.get(name, 0.0) + value / num_tokens
    return sum(loss for loss, _ in flat), means


def rollout_metrics(samples: Sequence[Sample], done: int) -> dict[str, float]:
    """Means over the responses of step ``done + 1``."""
    rollouts = [sample.rollout for sample in samples]
    count = len(samples)
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    graded = {"reward": sum(rewards) / len(rewards)} if rewards else {}
    return {
        **graded,
        "response_tokens": sum(len(rollout.response) for rollout in rollouts) / count,
        "truncated_share": sum(rollout.finish_reason == "length" for rollout in rollouts) / count,
        "staleness": sum(done - sum(r.token_versions) / len(r.response) for r in rollouts) / count,
    }


def step_result(
    run: Run,
    done: int,
    samples: Sequence[Sample],
    reports: Sequence[RowReport],
    update: tuple[float, float],
    agreement: Mapping[str, float],
    seconds: Mapping[str, float],
) -> StepResult:
    """Bring together what step ``done + 1`` is recorded with, the same on every process.

    Args:
        run: the run.
        done: steps done before.
        samples: the global batch.
        reports: of this process's microbatches, on the last stage.
        update: gradient norm before clipping, and learning rate.
        agreement: of ``log_prob_agreement``; empty where it was not looked at.
        seconds: wall time by phase.

    Collectives: an all-gather of Python objects and one of a few numbers over the world.
    """
    num_tokens = sum(len(sample.rollout.response) for sample in samples)
    loss, metrics = reduce_reports(run.model.layout, reports, num_tokens)
    flops = count_flops(run.model.architecture, samples, run.config)
    metrics |= {**agreement, **throughput_metrics(flops, num_tokens, seconds, run.platform.device)}
    if run.method.traits.samples_responses:
        metrics |= rollout_metrics(samples, done)
    return StepResult(done + 1, loss, *update, num_tokens, metrics, dict(seconds))
