"""Inputs and calls that the tests of the fused divergence share."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from copsd_kernels import reference
from copsd_kernels.reference import DivergenceKind
from megatron_copsd.loss.autograd import DEFAULT_GRADIENT_OPTIONS, GradientOptions
from megatron_copsd.loss.divergence import DivergenceResult, DivergenceSpec, fused_linear_divergence
from megatron_copsd.loss.implementation import Implementation
from megatron_copsd.types import VocabShard

ROWS, HIDDEN, VOCAB = 13, 7, 37
SMALL_SCRATCH = 12_000  # bytes: chunks of a few rows, blocks of fewer

KINDS: tuple[DivergenceKind, ...] = get_args(DivergenceKind)
SPECS = {
    **{kind: DivergenceSpec(kind) for kind in KINDS if kind != "jsd"},
    "jsd 0.1": DivergenceSpec("jsd", jsd_weight=0.1),
    "jsd 0.5": DivergenceSpec("jsd", jsd_weight=0.5),
    "jsd 0.9": DivergenceSpec("jsd", jsd_weight=0.9),
}
CLIPS = {
    "no clip": {},
    "entry clip": {"entry_clip": 0.05},
    "token clip": {"token_clip": 0.3},
    "both clips": {"entry_clip": 0.05, "token_clip": 0.3},
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
every_clip = pytest.mark.parametrize("clips", CLIPS.values(), ids=CLIPS)


def inputs(
    rows: int = ROWS, hidden: int = HIDDEN, vocab: int = VOCAB, dtype: torch.dtype = torch.float64, noise: float = 0.5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student hidden, teacher hidden, weight (the first and last are leaves), row weights."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    student = normal(rows, hidden)
    teacher = student + noise * normal(rows, hidden)
    weight = normal(vocab, hidden) * 2 * hidden**-0.5
    row_weights = torch.rand(rows, generator=generator) + 0.1
    return student.to(dtype).requires_grad_(), teacher.to(dtype), weight.to(dtype).requires_grad_(), row_weights


def fused(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    row_weights: Tensor,
    spec: DivergenceSpec,
    *,
    teacher_weight: Tensor | None = None,
    shard: VocabShard | None = None,
    scratch_bytes: int | None = SMALL_SCRATCH,
    implementation: Implementation = "auto",
    gradient_options: GradientOptions = DEFAULT_GRADIENT_OPTIONS,
) -> DivergenceResult:
    return fused_linear_divergence(
        student,
        teacher,
        weight,
        spec,
        row_weights,
        shard or VocabShard(start=0, rows=weight.shape[0], vocab_size=weight.shape[0]),
        teacher_weight=teacher_weight,
        scratch_bytes=scratch_bytes,
        implementation=implementation,
        gradient_options=gradient_options,
    )


def dense(student: Tensor, teacher: Tensor, weight: Tensor, spec: DivergenceSpec) -> Tensor:
    """Row divergences of the oracle in float64, differentiable in student and weight."""
    return reference.divergence(
        student.double() @ weight.double().t(),
        teacher.double() @ weight.detach().double().t(),
        spec.kind,
        jsd_weight=spec.jsd_weight,
        temperature=spec.temperature,
        entry_clip=spec.entry_clip,
        token_clip=spec.token_clip,
    )


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [gradient.double() for gradient in torch.autograd.grad(loss, leaves)]


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def logits_as_inputs(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs whose logits are exactly the given ones; the first R columns of dW are then the logits' gradient."""
    rows = student_logits.shape[0]
    select = torch.eye(2 * rows, dtype=student_logits.dtype)
    weight = torch.cat((student_logits, teacher_logits)).t().contiguous().requires_grad_()
    return select[:rows].clone().requires_grad_(), select[rows:], weight, torch.ones(rows)


def extreme_logits() -> dict[str, tuple[Tensor, Tensor]]:
    """Student's and teacher's logits where naive formulas overflow, underflow or lose everything, by name."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(2, 40, generator=generator)
    one_hot, other = torch.full((2, 40), -1e4), torch.full((2, 40), -1e4)
    one_hot[:, 3] = 1e4
    other[:, 7] = 1e4
    deep = torch.linspace(0, -300, 40).repeat(2, 1)
    shared_underflow = noise.clone()
    shared_underflow[:, 5:20] = -120
    return {
        "large": (noise * 1e4, noise.roll(1, dims=1) * 1e4),
        "disjoint one-hot": (one_hot, other),
        "equal one-hot": (one_hot, one_hot.clone()),
        "one-hot teacher": (noise, one_hot),
        "one-hot student": (one_hot, noise),
        "both underflow": (shared_underflow, shared_underflow + 0.1 * noise),
        "down to -300 nats": (deep, deep + noise),
    }
