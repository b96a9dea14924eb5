"""A teacher cut to its likeliest tokens, against the equations in float64."""

from __future__ import annotations

import pytest
import torch
from divergence_cases import fused, gradients, inputs

from megatron_copsd.errors import UserError
from megatron_copsd.loss.divergence import DivergenceSpec


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_forward_kl_to_the_renormalised_teacher(k, temperature):
    student, teacher, weight, row_weights = inputs()
    spec = DivergenceSpec("forward_kl", temperature=temperature, teacher_top_k=k)
    result = fused(student, teacher, weight, row_weights, spec)
    log_p = (teacher @ weight.detach().t() / temperature).log_softmax(-1)
    log_q = (student @ weight.t() / temperature).log_softmax(-1)
    kept, where = log_p.topk(k)
    mass = kept.exp().sum(-1)
    p = kept.exp() / mass[:, None]
    exact = (p * (p.log() - log_q.gather(1, where))).sum(-1)
    torch.testing.assert_close(result.token_divergence, exact.float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(result.teacher_tail_mass, (1 - mass).float(), rtol=1e-6, atol=1e-7)
    wanted = gradients((row_weights * exact).sum(), student, weight)
    torch.testing.assert_close(gradients(result.loss, student, weight), wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_keeping_the_whole_vocabulary_changes_nothing(kind):
    student, teacher, weight, row_weights = inputs()
    whole = fused(student, teacher, weight, row_weights, DivergenceSpec(kind))
    cut = fused(student, teacher, weight, row_weights, DivergenceSpec(kind, teacher_top_k=len(weight)))
    assert torch.equal(cut.token_divergence, whole.token_divergence)
    assert (cut.teacher_tail_mass == 0).all()


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(UserError, match=r"loss\.teacher_top_k.*infinite"):
        DivergenceSpec("reverse_kl", teacher_top_k=4)
    arguments = inputs(dtype=torch.float32)
    with pytest.raises(UserError, match=r"loss\.implementation.*teacher_top_k"):
        fused(*arguments, DivergenceSpec(teacher_top_k=4), implementation="streaming")
