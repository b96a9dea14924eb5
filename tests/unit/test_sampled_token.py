"""Sampled-token distillation by itself, against plain float64 autograd and against the divergence that it estimates."""

from __future__ import annotations

import pytest
import torch

from megatron_copsd.config.schema import Config, DataSettings, DataSource, LossSettings, ModelSettings
from megatron_copsd.data.batches.batching import microbatch
from megatron_copsd.loss.autograd import GradientOptions
from megatron_copsd.methods.base import OutputHead
from megatron_copsd.methods.sampled_token import SampledToken
from megatron_copsd.types import Problem, PromptPair, Rollout, Sample, VocabShard

HIDDEN, VOCAB, TEMPERATURE = 5, 11, 1.3


def method() -> SampledToken:
    config = Config(
        model=ModelSettings(path="m"),
        data=DataSettings(train=(DataSource(path="d", layout="released", language="SWA"),)),
        loss=LossSettings(temperature=TEMPERATURE),
    )
    return SampledToken(config)


def batch_of(labels: list[int], weights: list[float]):
    pair = PromptPair(Problem("p:1", "SWA", "?"), (1, 2), (1, 2, 3))
    samples = [Sample(pair, Rollout((label,), (0.0,), "stop", 0, ""), i) for i, label in enumerate(labels)]
    return microbatch(samples, "student", 0, weights)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {name: torch.randn(6, HIDDEN).double() for name in ("student", "teacher")}
    return made | {"weight": torch.randn(VOCAB, HIDDEN).double(), "teacher_weight": torch.randn(VOCAB, HIDDEN).double()}


def head(tensors: dict[str, torch.Tensor], own_teacher: bool) -> OutputHead:
    teacher = tensors["teacher_weight"] if own_teacher else None
    return OutputHead(tensors["weight"], VocabShard(0, VOCAB, VOCAB), None, teacher, GradientOptions(), "torch", None)


@pytest.mark.parametrize("own_teacher", [False, True])
def test_against_autograd(tensors: dict[str, torch.Tensor], own_teacher: bool) -> None:
    labels, weights = [3, 0, 10, 7, 7, 1], [0.1, 0.3, 0.2, 0.1, 0.2, 0.1]
    batch = batch_of(labels, weights)
    leaves = [tensors[name].requires_grad_() for name in ("student", "weight")]
    loss, report = method().row_loss(leaves[0], batch, head(tensors, own_teacher), tensors["teacher"])
    index = torch.tensor(labels)[:, None]
    log_s = torch.log_softmax(leaves[0] @ leaves[1].T / TEMPERATURE, -1).gather(1, index)[:, 0]
    of_teacher = tensors["teacher_weight"] if own_teacher else leaves[1].detach()
    log_t = torch.log_softmax(tensors["teacher"] @ of_teacher.T / TEMPERATURE, -1).gather(1, index)[:, 0]
    advantage = (log_t - log_s).detach()
    w = batch.row_weights.double()
    expected = -(w * advantage * log_s).sum()
    assert float(report.loss) == pytest.approx(-float((w * advantage).sum()), rel=1e-6)
    assert torch.allclose(report.token_losses.double(), -advantage, rtol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


def test_its_mean_over_the_vocabulary_is_the_gradient_of_the_reverse_divergence(
    tensors: dict[str, torch.Tensor],
) -> None:
    student = tensors["student"][:1].requires_grad_()
    teacher = tensors["teacher"][:1]
    log_s = torch.log_softmax(student @ tensors["weight"].T / TEMPERATURE, -1)
    log_t = torch.log_softmax(teacher @ tensors["weight"].T / TEMPERATURE, -1)
    (expected,) = torch.autograd.grad((log_s.exp() * (log_s - log_t)).sum(), student)
    chances = log_s.detach().exp()[0]
    mean = torch.zeros_like(student)
    for label in range(VOCAB):
        loss, _ = method().row_loss(student, batch_of([label], [1.0]), head(tensors, False), teacher)
        mean += chances[label] * torch.autograd.grad(loss, student)[0]
    assert float((mean - expected).norm() / expected.norm()) < 1e-6


def test_rows_of_both_roles_must_be_the_same(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(AssertionError, match="disagree"):
        method().row_loss(
            tensors["student"], batch_of([1] * 6, [1.0] * 6), head(tensors, False), tensors["teacher"][:5]
        )
