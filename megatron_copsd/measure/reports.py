"""What the last stages of all replicas report, brought together on every process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_copsd.methods.base import RowReport
from megatron_copsd.model.context import whole_rows
from megatron_copsd.model.parallel import Layout
from megatron_copsd.types import Microbatch, Sample


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


def by_sample(
    layout: Layout, batches: Sequence[Microbatch], token_values: Sequence[torch.Tensor]
) -> dict[int, list[float]]:
    """Return each sample's values of its response tokens by sample index, on every process.

    Args:
        layout: this process's place.
        batches: this replica's microbatches.
        token_values: [R] for each of them on the last stage; none elsewhere.

    Collectives: one all-reduce a microbatch over context ranks, one all-gather of Python objects over the world.
    """
    own: dict[int, list[float]] = {}
    for batch, values in zip(batches, token_values, strict=False):
        whole = whole_rows(batch, values.detach().float(), layout.context_group)
        parts = whole.cpu().split(batch.response_lengths)
        own |= {index: part.tolist() for index, part in zip(batch.sample_indices, parts, strict=True)}
    everywhere: list[dict[int, list[float]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, own if layout.reports else {})
    return {index: values for share in everywhere for index, values in share.items()}


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
