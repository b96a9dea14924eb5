"""The fused divergence on one shard, against the dense oracle, and the rules of the call."""

import math
from dataclasses import replace

import pytest
import torch
from divergence_cases import (
    HIDDEN,
    SMALL_SCRATCH,
    SPECS,
    VOCAB,
    dense,
    every_clip,
    every_spec,
    extreme_logits,
    fused,
    gradients,
    inputs,
    logits_as_inputs,
    relative_error,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from copsd_kernels import reference
from megatron_copsd.errors import UserError
from megatron_copsd.loss.divergence import DivergenceSpec, fused_linear_divergence
from megatron_copsd.types import VocabShard


@every_spec
@every_clip
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gradcheck(spec, clips, temperature):
    student, teacher, weight, row_weights = inputs(rows=4, hidden=2, vocab=23)
    spec = replace(spec, temperature=temperature, **clips)
    spec = _away_from_kinks(student, teacher, weight, spec)
    constant = weight.detach().clone()  # finite differences must not move the teacher

    def loss(student: Tensor, weight: Tensor) -> Tensor:
        return fused(student, teacher, weight, row_weights, spec, teacher_weight=constant).loss

    # gradcheck runs several backward passes through one graph; the checkpoint makes the gradients anew for each.
    assert torch.autograd.gradcheck(lambda *leaves: checkpoint(loss, *leaves, use_reentrant=False), (student, weight))


def _away_from_kinks(student: Tensor, teacher: Tensor, weight: Tensor, spec: DivergenceSpec) -> DivergenceSpec:
    """Move each clip to the middle of a gap between values, where finite differences do not cross it."""
    plain = replace(spec, entry_clip=None, token_clip=None)
    if spec.entry_clip is not None:
        logits, teacher_logits = student @ weight.t(), teacher @ weight.t()
        x, y = ((z / spec.temperature).log_softmax(-1) for z in (logits, teacher_logits))
        spec = replace(spec, entry_clip=_gap(_entries(x, y, spec).flatten(), count=12))
    if spec.token_clip is not None:
        divergences = dense(student, teacher, weight, replace(plain, entry_clip=spec.entry_clip))
        spec = replace(spec, token_clip=_gap(divergences, count=2))
    return spec


def _entries(x: Tensor, y: Tensor, spec: DivergenceSpec) -> Tensor:
    """Entries of the sum before any clip, from the log-softmax of the student's (x) and the teacher's logits (y)."""
    w = spec.jsd_weight
    log_m = torch.log(w * y.exp() + (1 - w) * x.exp())
    return {
        "forward_kl": y.exp() * (y - x),
        "reverse_kl": x.exp() * (x - y),
        "jsd": w * y.exp() * (y - log_m) + (1 - w) * x.exp() * (x - log_m),
    }[spec.kind]


def _gap(values: Tensor, count: int) -> float:
    """A positive number between two neighbours among the values' largest ``count`` + 1, in the widest gap there."""
    largest = values.detach().sort(descending=True).values[: count + 1]
    largest = largest[largest > 0]
    widths = largest[:-1] - largest[1:]
    index = int(widths.argmax())
    assert widths[index] > 1e-4
    return float((largest[index] + largest[index + 1]) / 2)


@every_spec
@every_clip
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 1e-2)]
)
def test_matches_the_oracle(spec, clips, dtype, tolerance):
    student, teacher, weight, row_weights = inputs(dtype=dtype)
    spec = replace(spec, temperature=0.7, **clips)
    result = fused(student, teacher, weight, row_weights, spec)
    exact = dense(student, teacher, weight, spec)
    exact_loss = (row_weights * exact).sum()

    torch.testing.assert_close(result.token_divergence.double(), exact, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(result.loss.double(), exact_loss, rtol=1e-5, atol=2e-6)
    found = gradients(result.loss, student, weight)
    for gradient, wanted in zip(found, gradients(exact_loss, student, weight), strict=True):
        assert relative_error(gradient, wanted) < tolerance


@every_spec
@pytest.mark.parametrize("clips", [{}, {"entry_clip": 1e-4}], ids=["no clip", "entry clip"])
def test_near_teacher_keeps_its_gradient_in_bfloat16(spec, clips):
    """Where the divergence is small, rounding the logits to bfloat16 would leave little of the gradient."""
    student, teacher, weight, row_weights = inputs(64, 128, 4000, torch.bfloat16, noise=0.02)
    spec = replace(spec, **clips)
    exact = dense(student, teacher, weight, spec)
    if spec.kind == "forward_kl" and not clips:
        assert 3e-4 < exact.mean() < 3e-3
    result = fused(student, teacher, weight, row_weights, spec, scratch_bytes=1 << 20)
    torch.testing.assert_close(result.token_divergence.double(), exact, rtol=1e-3, atol=1e-7)
    found = gradients(result.loss, student, weight)
    for gradient, wanted in zip(found, gradients((row_weights * exact).sum(), student, weight), strict=True):
        assert relative_error(gradient, wanted) < 1e-2


@every_spec
def test_diagnostics_match_the_oracle(spec):
    student, teacher, weight, row_weights = inputs()
    spec = replace(spec, entry_clip=0.02, temperature=1.3)
    result = fused(student, teacher, weight, row_weights, spec)
    x, y = ((h.detach() @ weight.detach().t() / 1.3).log_softmax(-1) for h in (student, teacher))
    clipped = _entries(x, y, spec) > 0.02
    assert 0 < clipped.double().mean() < 0.5
    wanted = {
        "clipped_entry_share": clipped.double().mean(-1),
        "clipped_teacher_mass": (y.exp() * clipped).sum(-1),
        "student_entropy": reference.entropy(x),
        "teacher_entropy": reference.entropy(y),
        "top1_agreement": (x.argmax(-1) == y.argmax(-1)).double(),
    }
    assert 0 < wanted["top1_agreement"].mean() < 1
    for name, values in wanted.items():
        torch.testing.assert_close(getattr(result, name), values.float(), rtol=1e-5, atol=1e-6, msg=name)


def test_teacher_with_its_own_weight():
    student, teacher, weight, row_weights = inputs()
    teacher_weight = (weight.detach() + 0.1 * torch.randn_like(weight)).requires_grad_()
    result = fused(student, teacher, weight, row_weights, SPECS["jsd 0.5"], teacher_weight=teacher_weight)
    exact = reference.divergence(student @ weight.t(), teacher @ teacher_weight.t(), "jsd", jsd_weight=0.5)
    torch.testing.assert_close(result.token_divergence, exact.float())
    result.loss.backward()
    wanted = gradients((row_weights * exact).sum(), student, weight)
    torch.testing.assert_close([student.grad, weight.grad], wanted)
    assert teacher_weight.grad is None


# Extreme values


@every_spec
@pytest.mark.parametrize("clips", [{}, {"entry_clip": 0.05}], ids=["no clip", "entry clip"])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("name", extreme_logits())
def testextreme_logits(spec, clips, temperature, name):
    student, teacher, weight, row_weights = logits_as_inputs(*extreme_logits()[name])
    spec = replace(spec, temperature=temperature, **clips)
    result = fused(student, teacher, weight, row_weights, spec)
    exact = dense(student, teacher, weight, spec)
    torch.testing.assert_close(result.token_divergence.double(), exact, rtol=1e-5, atol=2e-5)
    (found,), (wanted,) = gradients(result.loss, weight), gradients(exact.sum(), weight)
    # The gradient of reverse_kl is a difference of numbers as large as the divergence.
    largest = exact.max().item()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=(2e-5 + 2e-7 * largest) / temperature)


def test_a_value_equal_to_its_clip_is_not_clipped():
    # All of q on one entry, so that the row's divergence is that entry.
    logits = torch.tensor([[0.0, -1000.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    student, teacher, weight, row_weights = logits_as_inputs(*logits)
    entry = fused(student, teacher, weight, row_weights, DivergenceSpec("reverse_kl")).loss.item()
    for cap, share in ((entry, 0.0), (math.nextafter(entry, 0), 0.5)):
        spec = DivergenceSpec("reverse_kl", entry_clip=cap)
        assert fused(student, teacher, weight, row_weights, spec).clipped_entry_share == share

    student, teacher, weight, _ = inputs(rows=1)
    row = fused(student, teacher, weight, torch.ones(1), DivergenceSpec("reverse_kl")).loss.item()
    for cap, passes in ((row, True), (math.nextafter(row, 0), False)):
        loss = fused(student, teacher, weight, torch.ones(1), DivergenceSpec("reverse_kl", token_clip=cap)).loss
        (gradient,) = gradients(loss, student)
        assert (gradient != 0).any() == passes


# The call


def test_no_rows():
    student, teacher, weight, row_weights = inputs()
    result = fused(student[:0], teacher[:0], weight, row_weights[:0], SPECS["jsd 0.5"])
    assert result.loss == 0
    assert result.token_divergence.shape == (0,)
    hidden_gradient, weight_gradient = gradients(result.loss, student, weight)
    assert (hidden_gradient == 0).all()
    assert (weight_gradient == 0).all()


def test_only_the_gradients_asked_for_are_made():
    student, teacher, weight, row_weights = inputs()
    wanted = gradients(fused(student, teacher, weight, row_weights, SPECS["jsd 0.5"]).loss, student, weight)
    frozen = weight.detach()
    fused(student, teacher, frozen, row_weights, SPECS["jsd 0.5"]).loss.backward()
    torch.testing.assert_close(student.grad, wanted[0])
    assert frozen.grad is None
    fused(student.detach(), teacher, weight, row_weights, SPECS["jsd 0.5"]).loss.backward()
    torch.testing.assert_close(weight.grad, wanted[1])
    with torch.no_grad():
        assert not fused(student, teacher, weight, row_weights, SPECS["jsd 0.5"]).loss.requires_grad


def test_teacher_gets_no_gradient():
    student, teacher, weight, row_weights = inputs()
    teacher.requires_grad_()
    fused(student, teacher, weight, row_weights, SPECS["jsd 0.5"]).loss.backward()
    assert teacher.grad is None


def test_upstream_gradient_scales():
    student, teacher, weight, row_weights = inputs()
    plain = gradients(fused(student, teacher, weight, row_weights, SPECS["reverse_kl"]).loss, student, weight)
    scaled = gradients(fused(student, teacher, weight, row_weights, SPECS["reverse_kl"]).loss * -2.5, student, weight)
    torch.testing.assert_close(scaled, [gradient * -2.5 for gradient in plain])


def test_a_second_backward_pass_is_refused():
    student, teacher, weight, row_weights = inputs()
    loss = fused(student, teacher, weight, row_weights, SPECS["forward_kl"]).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_hidden_states_may_have_any_strides():
    student, teacher, weight, row_weights = inputs()
    wanted = fused(student, teacher, weight, row_weights, SPECS["jsd 0.1"])
    wide = torch.cat((student.detach(), teacher), dim=1)
    views = wide[:, :HIDDEN].requires_grad_(), wide.detach()[:, HIDDEN:].t().contiguous().t()
    assert not any(view.is_contiguous() for view in views)
    found = fused(*views, weight, row_weights, SPECS["jsd 0.1"])
    torch.testing.assert_close(found.token_divergence, wanted.token_divergence)
    torch.testing.assert_close(gradients(found.loss, views[0]), gradients(wanted.loss, student))


def test_rows_of_weight_zero_have_zero_gradient():
    student, teacher, weight, row_weights = inputs()
    row_weights[4] = 0
    (gradient,) = gradients(fused(student, teacher, weight, row_weights, SPECS["jsd 0.5"]).loss, student)
    assert (gradient[4] == 0).all()
    assert (gradient[3] != 0).any()


@every_spec
def test_vocabulary_padding_is_never_read(spec):
    student, teacher, weight, row_weights = inputs()
    wanted = fused(student, teacher, weight, row_weights, spec)
    padding = torch.full((11, HIDDEN), torch.nan, dtype=torch.float64)
    padded = torch.cat((weight.detach(), padding)).requires_grad_()
    shard = VocabShard(start=0, rows=VOCAB + 11, vocab_size=VOCAB)
    found = fused_linear_divergence(student, teacher, padded, spec, row_weights, shard, scratch_bytes=SMALL_SCRATCH)
    torch.testing.assert_close(found.token_divergence, wanted.token_divergence)
    (gradient,), (wanted_gradient,) = gradients(found.loss, padded), gradients(wanted.loss, weight)
    torch.testing.assert_close(gradient[:VOCAB], wanted_gradient)
    assert (gradient[VOCAB:] == 0).all()


def test_a_budget_below_one_row_is_refused():
    with pytest.raises(UserError, match=r"loss\.scratch_mb") as caught:
        fused(*inputs(), SPECS["jsd 0.5"], scratch_bytes=1000)
    assert "Raise the budget" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"kind": "kl"}, "loss.divergence"),
        ({"jsd_weight": 1.0}, "loss.jsd_weight"),
        ({"temperature": 0.0}, "loss.temperature"),
        ({"entry_clip": -1.0}, "loss.entry_clip"),
        ({"token_clip": 0.0}, "loss.token_clip"),
    ],
)
def test_settings_out_of_range_are_refused(settings, name):
    with pytest.raises(UserError, match=name):
        DivergenceSpec(**settings)
