"""GRPO by itself: what a step reports is its surrogate, and what it minimises has the surrogate's gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_copsd.config.schema import (
    Config,
    DataSettings,
    DataSource,
    ModelSettings,
    PolicySettings,
    RolloutSettings,
)
from megatron_copsd.data.batches.batching import microbatch
from megatron_copsd.loss.autograd import GradientOptions
from megatron_copsd.methods.base import OutputHead, RowReport
from megatron_copsd.methods.grpo import Grpo
from megatron_copsd.types import Problem, PromptPair, Rollout, Sample, VocabShard

HIDDEN, VOCAB = 7, 37
ADVANTAGES, LENGTHS = (1.5, -0.5, -1.0), (2, 5, 3)


def row_loss(
    hidden: torch.Tensor, weight: torch.Tensor, temperature: float, sampled: torch.Tensor | None = None, **policy: Any
) -> tuple[torch.Tensor, RowReport]:
    """The loss of three responses; ``sampled`` are the log-probabilities of their tokens when they were sampled."""
    config = Config(
        model=ModelSettings(path="m"),
        data=DataSettings(train=(DataSource(path="d", layout="released", language="SWA"),)),
        rollout=RolloutSettings(temperature=temperature),
        policy=PolicySettings(**policy),
    )
    pair = PromptPair(Problem("p:1", "SWA", "?"), (1, 2), (1, 2))
    before = (torch.zeros(sum(LENGTHS)) if sampled is None else sampled).split(list(LENGTHS))
    samples = [
        Sample(pair, Rollout(tuple(range(3, 3 + n)), tuple(before[index].tolist()), "stop", 0, ""), index, advantage)
        for index, (n, advantage) in enumerate(zip(LENGTHS, ADVANTAGES, strict=True))
    ]
    weights = [advantage / sum(LENGTHS) for advantage in ADVANTAGES]
    batch = microbatch(samples, "student", 0, weights)
    head = OutputHead(weight, VocabShard(0, VOCAB, VOCAB), None, None, GradientOptions(), "torch", None)
    return Grpo(config).row_loss(hidden, batch, head, None)


def label_log_probs(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    labels = torch.tensor([3 + i for n in LENGTHS for i in range(n)])
    return torch.log_softmax(hidden @ weight.T / temperature, dim=-1).gather(1, labels[:, None])[:, 0]


@pytest.fixture
def leaves() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(sum(LENGTHS), HIDDEN), torch.randn(VOCAB, HIDDEN)
    return hidden.double().requires_grad_(), weight.double().requires_grad_()


def test_the_surrogate_is_reported_and_has_the_gradient(leaves: tuple[torch.Tensor, torch.Tensor]) -> None:
    hidden, weight = leaves
    loss, report = row_loss(hidden, weight, temperature=0.7)
    advantages = torch.tensor(ADVANTAGES).double().repeat_interleave(torch.tensor(LENGTHS))
    log_probs = label_log_probs(hidden, weight, 0.7)
    ratios = (log_probs - log_probs.detach()).exp()
    surrogate = -(ratios * advantages).mean()
    assert float(report.loss) == pytest.approx(float(surrogate.detach()), rel=1e-6)
    assert float(loss.detach()) != pytest.approx(float(surrogate.detach()), rel=1e-2)
    (ours,) = torch.autograd.grad(loss, hidden)
    (theirs,) = torch.autograd.grad(surrogate, hidden)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_what_is_not_finite_is_reported_as_that(leaves: tuple[torch.Tensor, torch.Tensor]) -> None:
    hidden, weight = leaves
    _, report = row_loss(hidden.detach() * float("nan"), weight, temperature=1.0)
    assert not torch.isfinite(report.loss)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.28), (0.05, 3.0), (0.9, 0.01)])
def test_clipped_ratios_against_autograd(leaves: tuple[torch.Tensor, torch.Tensor], low: float, high: float) -> None:
    """Equation 3 of the paper in plain float64, where the sampling policy was another; all four cases of the clip."""
    hidden, weight = leaves
    log_probs = label_log_probs(hidden, weight, 0.7)
    offsets = torch.linspace(0.05, 1.5, len(log_probs)) * torch.tensor([1, -1]).repeat(len(log_probs) // 2)
    sampled = (log_probs.detach() + offsets).float()  # as the batch holds them
    loss, report = row_loss(hidden, weight, 0.7, sampled, ratio="sampled", clip_low=low, clip_high=high)
    advantages = torch.tensor(ADVANTAGES).double().repeat_interleave(torch.tensor(LENGTHS)) / sum(LENGTHS)
    advantages = advantages.float().double()  # as row_weights hold them
    ratios = (log_probs - sampled.double()).exp()
    terms = torch.min(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages)
    cases = {(bool(a > 0), bool(q < 1)) for a, q in zip(advantages, ratios, strict=True)}
    assert len(cases) == 4
    assert float(loss) == pytest.approx(-float(terms.sum()), rel=1e-6)
    assert float(report.loss) == float(loss.detach())
    assert float(report.row_sums["importance_ratio"]) == pytest.approx(float(ratios.sum()), rel=1e-6)
    held = terms.detach() < (ratios * advantages).detach() - 1e-12
    assert int(report.row_sums["clipped_ratio_share"]) == int(held.sum())
    for ours, theirs in zip(
        torch.autograd.grad(loss, leaves, retain_graph=True), torch.autograd.grad(-terms.sum(), leaves), strict=True
    ):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


def test_a_ratio_of_one_has_the_gradient_of_the_likelihood(leaves: tuple[torch.Tensor, torch.Tensor]) -> None:
    hidden, weight = leaves
    sampled = label_log_probs(hidden, weight, 1.0).detach().float()
    ratio, _ = row_loss(hidden, weight, 1.0, sampled, ratio="sampled")
    plain, _ = row_loss(hidden, weight, 1.0)
    for ours, theirs in zip(torch.autograd.grad(ratio, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
