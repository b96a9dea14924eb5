"""The fused cross-entropy on one shard, against the dense oracle and against itself."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from copsd_kernels import reference
from megatron_copsd.errors import UserError
from megatron_copsd.loss.cross_entropy import CrossEntropyResult, fused_linear_cross_entropy
from megatron_copsd.types import VocabShard

ROWS, HIDDEN, VOCAB = 13, 7, 37
SMALL_SCRATCH = 8_000  # bytes: chunks of a few rows, blocks of fewer


def inputs(dtype: torch.dtype = torch.float64, hidden: int = HIDDEN) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden and weight (leaves), labels, row weights of both signs, as advantages are."""
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(ROWS, hidden, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, hidden, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCAB, (ROWS,), generator=generator)
    labels[:2] = torch.tensor([0, VOCAB - 1])
    row_weights = torch.randn(ROWS, generator=generator)
    return states.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, row_weights


def fused(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    row_weights: Tensor,
    *,
    temperature: float = 1.0,
    scratch_bytes: int = SMALL_SCRATCH,
) -> CrossEntropyResult:
    shard = VocabShard(start=0, rows=weight.shape[0], vocab_size=weight.shape[0])
    return fused_linear_cross_entropy(
        hidden, weight, labels, row_weights, shard, temperature=temperature, scratch_bytes=scratch_bytes
    )


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [gradient.double() for gradient in torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gradcheck(temperature):
    hidden, weight, labels, row_weights = inputs(hidden=3)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused(hidden, weight, labels, row_weights, temperature=temperature).loss

    # gradcheck runs several backward passes through one graph; the checkpoint makes the gradients anew for each.
    assert torch.autograd.gradcheck(lambda *leaves: checkpoint(loss, *leaves, use_reentrant=False), (hidden, weight))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("scratch_bytes", [SMALL_SCRATCH, 1 << 20])
def test_matches_the_oracle(dtype, tolerance, temperature, scratch_bytes):
    hidden, weight, labels, row_weights = inputs(dtype)
    result = fused(hidden, weight, labels, row_weights, temperature=temperature, scratch_bytes=scratch_bytes)
    logits = hidden.double() @ weight.double().t()
    exact = reference.token_log_prob(logits, labels, temperature=temperature)
    exact_loss = -(row_weights * exact).sum()

    torch.testing.assert_close(result.token_log_probs.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.loss.double(), exact_loss, rtol=1e-6, atol=1e-6)
    entropy = reference.entropy(logits, temperature=temperature)
    torch.testing.assert_close(result.entropy.double(), entropy, rtol=1e-6, atol=1e-6)
    found = gradients(result.loss, hidden, weight)
    for gradient, wanted in zip(found, gradients(exact_loss, hidden, weight), strict=True):
        assert (gradient - wanted).norm() < tolerance * wanted.norm()


def test_large_logits():
    hidden, weight, labels, row_weights = inputs(torch.float32)
    scaled = (weight.detach() * 3000).requires_grad_()
    result = fused(hidden, scaled, labels, row_weights)
    exact = reference.token_log_prob(hidden.double() @ scaled.double().t(), labels)
    torch.testing.assert_close(result.token_log_probs.double(), exact, rtol=1e-5, atol=1e-5)
    found = gradients(result.loss, hidden, scaled)
    for gradient, wanted in zip(found, gradients(-(row_weights * exact).sum(), hidden, scaled), strict=True):
        assert (gradient - wanted).norm() < 1e-3 * wanted.norm()


def test_vocabulary_padding_is_never_read():
    hidden, weight, labels, row_weights = inputs()
    wanted = fused(hidden, weight, labels, row_weights)
    padded = torch.cat((weight.detach(), torch.full((5, HIDDEN), torch.nan, dtype=torch.float64))).requires_grad_()
    shard = VocabShard(start=0, rows=VOCAB + 5, vocab_size=VOCAB)
    found = fused_linear_cross_entropy(hidden, padded, labels, row_weights, shard)
    torch.testing.assert_close(found.token_log_probs, wanted.token_log_probs)
    (gradient,), (wanted_gradient,) = gradients(found.loss, padded), gradients(wanted.loss, weight)
    torch.testing.assert_close(gradient[:VOCAB], wanted_gradient)
    assert (gradient[VOCAB:] == 0).all()


def test_no_rows():
    hidden, weight, labels, row_weights = inputs()
    result = fused(hidden[:0], weight, labels[:0], row_weights[:0])
    assert result.loss == 0
    assert result.token_log_probs.shape == (0,)
    assert all((gradient == 0).all() for gradient in gradients(result.loss, hidden, weight))


def test_without_gradients():
    hidden, weight, labels, row_weights = inputs()
    wanted = fused(hidden, weight, labels, row_weights)
    with torch.no_grad():
        found = fused(hidden, weight, labels, row_weights)
    assert not found.loss.requires_grad
    assert torch.equal(found.token_log_probs, wanted.token_log_probs)


def test_upstream_gradient_scales_and_a_frozen_weight_gets_none():
    hidden, weight, labels, row_weights = inputs()
    (unit,) = gradients(fused(hidden, weight, labels, row_weights).loss, hidden)
    frozen = weight.detach()
    (fused(hidden, frozen, labels, row_weights).loss / 4).backward()
    torch.testing.assert_close(hidden.grad, unit / 4)
    assert frozen.grad is None


@pytest.mark.parametrize("label", [-100, VOCAB])
def test_a_label_outside_the_vocabulary_is_refused(label):
    hidden, weight, labels, row_weights = inputs()
    labels[3] = label
    with pytest.raises(UserError, match=r"labels: .*row 3: must be at least 0 and below"):
        fused(hidden, weight, labels, row_weights)


def test_a_budget_below_one_row_is_refused():
    with pytest.raises(UserError, match=r"loss\.scratch_mb"):
        fused(*inputs(), scratch_bytes=500)
