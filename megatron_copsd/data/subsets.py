"""What is drawn together, and what a response counts so that subsets weigh alike whatever their sizes.

Sum over subsets d of 1/|D_d| times the sum over their responses of CE (SDRRL, arXiv 2402.12204, section 3): under
``loss.reduction: subset_mean`` a step's loss is an unbiased estimate of it, and the mean over the steps of an epoch is
the sum itself. CE is the mean over a response's tokens.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from megatron_copsd.config.schema import DataSource
from megatron_copsd.types import PromptPair, Rollout

TrainItem = tuple[PromptPair, Rollout | None]
"""A problem's prompts and, when training is supervised, its reference response."""

Unit = tuple[TrainItem, ...]
"""What one draw gives: the variants of a group, or one problem that stands alone."""


def units(items: Sequence[TrainItem]) -> tuple[Unit, ...]:
    """Return the items of one source by group, in the order in which the groups begin."""
    found: dict[tuple[bool, object], list[TrainItem]] = {}
    for number, item in enumerate(items):
        group = item[0].problem.group
        found.setdefault((False, number) if group is None else (True, group), []).append(item)
    return tuple(map(tuple, found.values()))


def shares(sources: Sequence[DataSource], train: Sequence[Sequence[Unit]]) -> list[float]:
    """Return the share of each source in the training stream; they sum to 1."""
    given = [
        float(len(found) if source.weight == "rows" else source.weight)
        for source, found in zip(sources, train, strict=True)
    ]
    return [weight / sum(given) for weight in given]


def weigh(
    sources: Sequence[DataSource], train: Sequence[Sequence[Unit]], draws_per_step: int
) -> tuple[tuple[Unit, ...], ...]:
    """Give every prompt its ``subset_weight``.

    Of a source with U units and share s, each unit comes n s / U times a step on average, n draws a step. A response
    of subset d then counts U / (n s |D_d|), where |D_d| are its rows over all sources. Rows that name no subset are
    those of their source.

    Args:
        sources: settings, which say the shares.
        train: units by source.
        draws_per_step: n.

    Returns:
        The units with weights.
    """
    names = [
        [[pair.problem.subset or number for pair, _ in unit] for unit in found] for number, found in enumerate(train)
    ]
    sizes = Counter(name for of_source in names for of_unit in of_source for name in of_unit)
    weighed = []
    for found, named, share in zip(train, names, shares(sources, train), strict=True):
        scale = len(found) / (draws_per_step * share)
        weighed.append(
            tuple(
                tuple(
                    (dataclasses.replace(pair, subset_weight=scale / sizes[name]), reference)
                    for (pair, reference), name in zip(unit, of_unit, strict=True)
                )
                for unit, of_unit in zip(found, named, strict=True)
            )
        )
    return tuple(weighed)
