"""When the gradients of the fused losses are made and where they go: none of it changes them."""

import pytest
import torch
from divergence_cases import HIDDEN, VOCAB, dense, every_clip, every_spec, fused, gradients, inputs

from megatron_copsd.loss.autograd import GradientOptions
from megatron_copsd.loss.cross_entropy import fused_linear_cross_entropy
from megatron_copsd.loss.divergence import DivergenceSpec
from megatron_copsd.types import VocabShard

SPEC = DivergenceSpec("jsd", jsd_weight=0.3, entry_clip=0.05, temperature=0.7)
RECOMPUTE = GradientOptions(recompute=True)


@every_spec
@every_clip
def test_recomputed_gradients_are_the_same_bits(spec, clips):
    student, teacher, weight, row_weights = inputs(dtype=torch.float32)
    plain = fused(student, teacher, weight, row_weights, spec)
    again = fused(student, teacher, weight, row_weights, spec, gradient_options=RECOMPUTE)
    assert torch.equal(plain.loss, again.loss)
    for a, b in zip(gradients(plain.loss, student, weight), gradients(again.loss, student, weight), strict=True):
        assert torch.equal(a, b)


@every_spec
def test_recomputed_rows_take_any_upstream_gradient(spec):
    """A nonlinear function of the row values, as no row weights known beforehand can express."""
    student, teacher, weight, row_weights = inputs()
    found = fused(student, teacher, weight, row_weights, spec, gradient_options=RECOMPUTE).token_divergence
    exact = dense(student, teacher, weight, spec)
    wanted = gradients(exact.square().sum(), student, weight)
    torch.testing.assert_close(gradients(found.square().sum(), student, weight), wanted, rtol=1e-6, atol=1e-7)


def test_recomputed_gradients_can_be_made_twice():
    student, teacher, weight, row_weights = inputs()
    loss = fused(student, teacher, weight, row_weights, SPEC, gradient_options=RECOMPUTE).loss
    first = torch.autograd.grad(loss, (student, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (student, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_recomputed_cross_entropy_gives_the_gradient_of_a_clipped_ratio():
    """What off-policy GRPO needs: a function of each token's log-probability."""
    hidden, _, weight, row_weights = inputs()
    labels = torch.randint(VOCAB, (len(hidden),), generator=torch.Generator().manual_seed(1))
    shard = VocabShard(0, VOCAB, VOCAB)

    def objective(log_probs: torch.Tensor) -> torch.Tensor:
        ratio = (log_probs - log_probs.detach() + 0.1).exp()
        return torch.minimum(ratio * row_weights, ratio.clamp(max=1.05) * row_weights).sum()

    found = fused_linear_cross_entropy(hidden, weight, labels, row_weights, shard, gradient_options=RECOMPUTE)
    exact = (hidden @ weight.t()).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    wanted = gradients(objective(exact), hidden, weight)
    torch.testing.assert_close(
        gradients(objective(found.token_log_probs), hidden, weight), wanted, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weight_gradient_goes_where_it_is_wanted(recompute, dtype):
    student, teacher, weight, row_weights = inputs(dtype=dtype)
    main_grad = torch.ones(VOCAB, HIDDEN)
    options = GradientOptions(recompute=recompute, weight_gradient=main_grad)
    fused(student, teacher, weight, row_weights, SPEC, gradient_options=options).loss.backward()
    assert weight.grad is None
    leaves = [leaf.detach().double().requires_grad_() for leaf in (student, weight)]
    exact = gradients((row_weights * dense(leaves[0], teacher, leaves[1], SPEC)).sum(), *leaves)
    # Neither the logits' gradient nor the sum is rounded to bfloat16.
    torch.testing.assert_close(main_grad.double() - 1, exact[1], rtol=1e-5, atol=1e-6)
    assert (student.grad.double() - exact[0]).norm() < 1e-2 * exact[0].norm()


def test_a_weight_gradient_already_given_out_cannot_be_scaled():
    student, teacher, weight, row_weights = inputs(dtype=torch.float32)
    options = GradientOptions(weight_gradient=torch.zeros(VOCAB, HIDDEN))
    loss = fused(student, teacher, weight, row_weights, SPEC, gradient_options=options).loss
    with pytest.raises(RuntimeError, match="upstream must be 1"):
        (2 * loss).backward()


def test_nothing_is_added_without_gradients():
    student, teacher, weight, row_weights = inputs(dtype=torch.float32)
    main_grad = torch.zeros(VOCAB, HIDDEN)
    with torch.no_grad():
        fused(student, teacher, weight, row_weights, SPEC, gradient_options=GradientOptions(weight_gradient=main_grad))
    assert not main_grad.any()
