"""What the last stages of all replicas report, brought together on every process."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from megatron_copsd import platform
from megatron_copsd.measure.throughput import count_flops, throughput_metrics
from megatron_copsd.methods.base import RowReport
from megatron_copsd.model.optimizer import Update
from megatron_copsd.model.parallel import Layout
from megatron_copsd.model.teacher import TeacherRows
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


def fault_before_update(loss: float, teacher_rows: TeacherRows | None) -> str | None:
    """Say what of a step is not finite, so that its gradient must not be applied; None where all is.

    The loss alone does not tell: a cap on what a token contributes can hide the teacher's NaN.

    Collectives: one of a number, with a teacher.
    """
    if teacher_rows is not None and platform.largest(int(not teacher_rows.are_finite())):
        return "the teacher's hidden states hold NaN or infinity"
    return None if math.isfinite(loss) else f"the loss is {loss}"


def count_loss_tokens(samples: Sequence[Sample]) -> int:
    """Number of response tokens of the global batch."""
    return sum(len(sample.rollout.response) for sample in samples)


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
    losses: tuple[float, dict[str, float]],
    update: Update,
    fault: str | None,
    agreement: Mapping[str, float],
    seconds: Mapping[str, float],
) -> StepResult:
    """Bring together what step ``done + 1`` is recorded with, the same on every process.

    Args:
        run: the run.
        done: steps done before.
        samples: the global batch.
        losses: of ``reduce_reports``.
        update: what became of the gradient.
        fault: why it was not applied; None where it was.
        agreement: of ``log_prob_agreement``; empty where it was not looked at.
        seconds: wall time by phase.

    Collectives: one of a few numbers over the world.
    """
    num_tokens = count_loss_tokens(samples)
    loss, metrics = losses[0], dict(losses[1])
    flops = count_flops(run.model.architecture, samples, run.config)
    metrics |= {**agreement, **throughput_metrics(flops, num_tokens, seconds, run.platform.device)}
    if run.method.traits.samples_responses:
        metrics |= rollout_metrics(samples, done)
    norm, rate = update.grad_norm, update.learning_rate
    return StepResult(done + 1, loss, norm, rate, num_tokens, metrics, dict(seconds), fault)
