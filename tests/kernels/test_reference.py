"""The oracle itself, against numbers worked out by hand and torch's own divergence."""

import math
from typing import get_args

import pytest
import torch
from divergence_cases import KINDS
from torch.nn.functional import cross_entropy, kl_div

from copsd_kernels import reference
from copsd_tools.bench.kernels import presets
from megatron_copsd.config.sections.objective import LossSettings


def logits(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def gradient(student: torch.Tensor, teacher: torch.Tensor, kind: str, **settings: float) -> torch.Tensor:
    student = student.clone().requires_grad_()
    reference.divergence(student, teacher, kind, **settings).sum().backward()
    return student.grad


def random_pair(rows: int = 6, vocab: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * 2 for _ in range(2))


def test_settings_and_benchmarks_offer_what_the_oracle_has():
    """The settings may not import kernels, and a help text nothing heavy: they have lists of their own."""
    assert get_args(LossSettings.model_fields["divergence"].annotation) == KINDS == presets.KINDS


def test_forward_kl_of_known_distributions():
    found = reference.divergence(logits(0.001, 0.999), logits(0.5, 0.5), "forward_kl")
    torch.testing.assert_close(found.item(), 0.5 * math.log(0.5 / 0.001) + 0.5 * math.log(0.5 / 0.999))


def test_entry_clip_can_make_the_divergence_negative():
    """Clipping each entry keeps the negative ones whole: a property of the objective, not of an implementation."""
    found = reference.divergence(logits(0.001, 0.999), logits(0.5, 0.5), "forward_kl", entry_clip=0.05)
    torch.testing.assert_close(found.item(), 0.05 + 0.5 * math.log(0.5 / 0.999))


def test_entry_clip_gradient_still_flows_through_the_normaliser():
    student, teacher = logits(0.05, 0.55, 0.40), logits(0.9, 0.06, 0.04)
    plain = gradient(student, teacher, "forward_kl")
    clipped = gradient(student, teacher, "forward_kl", entry_clip=0.05)
    torch.testing.assert_close(plain, torch.tensor([[-0.85, 0.49, 0.36]], dtype=torch.float64))
    torch.testing.assert_close(clipped, torch.tensor([[0.005, -0.005, 0.0]], dtype=torch.float64))


def test_kl_matches_torch():
    student, teacher = random_pair()
    x, y = student.log_softmax(-1), teacher.log_softmax(-1)
    forward, reverse = (kl_div(a, b, log_target=True, reduction="none").sum(-1) for a, b in ((x, y), (y, x)))
    torch.testing.assert_close(reference.divergence(student, teacher, "forward_kl"), forward)
    torch.testing.assert_close(reference.divergence(student, teacher, "reverse_kl"), reverse)


def test_jsd_is_log_2_for_disjoint_distributions():
    student, teacher = torch.tensor([[0.0, -900.0]]), torch.tensor([[-900.0, 0.0]])
    found = reference.divergence(student.double(), teacher.double(), "jsd", jsd_weight=0.5)
    torch.testing.assert_close(found.item(), math.log(2))


def test_gradient_passes_where_a_clip_is_reached_exactly():
    student, teacher = random_pair(rows=1)
    exact = reference.divergence(student, teacher, "forward_kl").item()
    assert gradient(student, teacher, "forward_kl", token_clip=exact).abs().sum() > 0.1
    assert gradient(student, teacher, "forward_kl", token_clip=math.nextafter(exact, 0)).abs().sum() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_divides_both_logits_and_nothing_else(kind):
    student, teacher = random_pair()
    torch.testing.assert_close(
        reference.divergence(student, teacher, kind, temperature=2.0),
        reference.divergence(student / 2, teacher / 2, kind),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_is_a_constant(kind):
    student, teacher = random_pair()
    teacher.requires_grad_()
    reference.divergence(student.requires_grad_(), teacher, kind).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="backward_kl"):
        reference.divergence(*random_pair(), "backward_kl")


def test_token_log_prob_is_minus_cross_entropy():
    student, _ = random_pair()
    labels = torch.arange(6)
    found = reference.token_log_prob(student, labels, temperature=0.5)
    torch.testing.assert_close(found, -cross_entropy(student * 2, labels, reduction="none"))


def test_entropy_of_the_uniform_distribution():
    torch.testing.assert_close(reference.entropy(torch.zeros(1, 8)).item(), math.log(8))
