"""GRPO by itself: what a step reports is its surrogate, and what it minimises has the surrogate's gradient."""

from __future__ import annotations

import pytest
import torch

from megatron_copsd.config.schema import Config, DataSettings, DataSource, ModelSettings
from megatron_copsd.data.batches.batching import microbatch
from megatron_copsd.loss.autograd import GradientOptions
from megatron_copsd.methods.base import OutputHead, RowReport
from megatron_copsd.methods.grpo import Grpo
from megatron_copsd.types import Problem, PromptPair, Rollout, Sample, VocabShard

HIDDEN, VOCAB = 7, 37
ADVANTAGES, LENGTHS = (1.5, -0.5, -1.0), (2, 5, 3)


def row_loss(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> tuple[torch.Tensor, RowReport]:
    config = Config(
        model=ModelSettings(path="m"),
        data=DataSettings(train=(DataSource(path="d", layout="released", language="SWA"),)),
    )
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"temperature": temperature})})
    pair = PromptPair(Problem("p:1", "SWA", "?"), (1, 2), (1, 2))
    samples = [
        Sample(pair, Rollout(tuple(range(3, 3 + n)), (0.0,) * n, "stop", 0, ""), index, advantage)
        for index, (n, advantage) in enumerate(zip(LENGTHS, ADVANTAGES, strict=True))
    ]
    weights = [advantage / sum(LENGTHS) for advantage in ADVANTAGES]
    batch = microbatch(samples, "student", 0, weights)
    head = OutputHead(weight, VocabShard(0, VOCAB, VOCAB), None, None, GradientOptions(), "torch", None)
    return Grpo(config).row_loss(hidden, batch, head, None)


@pytest.fixture
def leaves() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(sum(LENGTHS), HIDDEN), torch.randn(VOCAB, HIDDEN)
    return hidden.double().requires_grad_(), weight.double().requires_grad_()


def test_the_surrogate_is_reported_and_has_the_gradient(leaves: tuple[torch.Tensor, torch.Tensor]) -> None:
    hidden, weight = leaves
    loss, report = row_loss(hidden, weight, temperature=0.7)
    advantages = torch.tensor(ADVANTAGES).double().repeat_interleave(torch.tensor(LENGTHS))
    labels = torch.tensor([3 + i for n in LENGTHS for i in range(n)])
    log_probs = torch.log_softmax(hidden @ weight.T / 0.7, dim=-1).gather(1, labels[:, None])[:, 0]
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
