"""The published objective, written anew from its equations in float64, against the fused loss.

Equation of arXiv 2605.09548 section 4 with the pointwise clip of arXiv 2601.18734: over a batch of padded sequences,
the mean over unmasked positions of sum_v min(l_v, c), l_v an entry of KL(p||q), of KL(q||p), or of the mixture's
divergence; p and q are softmaxes of logits / 1.1.
"""

import pytest
import torch
from divergence_cases import fused, gradients

from megatron_copsd.loss.divergence import DivergenceSpec

BATCH, POSITIONS, HIDDEN, VOCAB = 3, 6, 5, 29
TEMPERATURE, CLIP = 1.1, 0.05


def published(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, kind: str, clip: float | None):
    """Mean over unmasked positions; logits [B, T, V], mask [B, T]."""
    q, p = (torch.softmax(logits / TEMPERATURE, dim=-1) for logits in (student, teacher))
    if kind == "forward_kl":
        entries = p * torch.log(p / q)
    elif kind == "reverse_kl":
        entries = q * torch.log(q / p)
    else:
        m = (p + q) / 2
        entries = (p * torch.log(p / m) + q * torch.log(q / m)) / 2
    if clip is not None:
        entries = torch.minimum(entries, torch.full_like(entries, clip))
    return (entries.sum(-1) * mask).sum() / mask.sum()


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "reverse_kl"])
@pytest.mark.parametrize("clip", [CLIP, None])
def test_the_published_loss(kind, clip):
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(BATCH, POSITIONS, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(BATCH, POSITIONS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(BATCH, POSITIONS, generator=generator) < 0.7

    wanted = published(student @ weight.t(), teacher @ weight.detach().t(), mask, kind, clip)
    spec = DivergenceSpec(kind, temperature=TEMPERATURE, entry_clip=clip)
    row_weights = torch.full((int(mask.sum()),), 1.0, dtype=torch.float64) / mask.sum()
    found = fused(student[mask], teacher[mask], weight, row_weights, spec).loss

    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        gradients(found, student, weight), gradients(wanted, student, weight), rtol=0, atol=1e-10
    )
