"""Groups of chunks, as bfloat16 on CUDA takes them: the logits' gradient is rounded and enters its products by groups.

A CPU has no product of bfloat16 operands with float32 results, so the test supplies one; all else is what runs on CUDA.
"""

import pytest
import torch
from divergence_cases import dense, every_clip, every_spec, fused, gradients, inputs, relative_error
from torch import Tensor

from copsd_kernels import gemm
from megatron_copsd.errors import UserError
from megatron_copsd.loss.autograd import GradientOptions, Gradients
from megatron_copsd.loss.divergence import DivergenceSpec

ROWS, VOCAB, SCRATCH = 150, 64, 26_000


@pytest.fixture(autouse=True)
def native_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(left: Tensor, right: Tensor, out: Tensor) -> None:
        out.copy_(left.float() @ right.float())

    monkeypatch.setattr(gemm, "_multiplies_natively", lambda weight: True)
    monkeypatch.setattr(gemm, "_mm", product)


@every_spec
@every_clip
def test_matches_the_oracle(spec, clips, monkeypatch):
    groups: list[int] = []
    add = Gradients.add

    def counted(self: Gradients, rows: slice, *arguments: object) -> None:
        groups.append(rows.stop - rows.start)
        add(self, rows, *arguments)

    monkeypatch.setattr(Gradients, "add", counted)
    student, teacher, weight, row_weights = inputs(ROWS, 16, VOCAB, torch.bfloat16)
    spec = DivergenceSpec(spec.kind, spec.jsd_weight, **clips)
    result = fused(student, teacher, weight, row_weights, spec, scratch_bytes=SCRATCH)
    assert sum(groups) == ROWS
    assert 1 < len(groups) < ROWS / 8, "several groups, each of several chunks"
    exact = dense(student, teacher, weight, spec)
    torch.testing.assert_close(result.token_divergence.double(), exact, rtol=1e-5, atol=2e-6)
    found, wanted = gradients(result.loss, student, weight), gradients((row_weights * exact).sum(), student, weight)
    for gradient, other in zip(found, wanted, strict=True):
        assert relative_error(gradient, other) < 1e-2


@every_spec
def test_near_teacher_keeps_its_gradient(spec):
    student, teacher, weight, row_weights = inputs(64, 128, 4000, torch.bfloat16, noise=0.02)
    result = fused(student, teacher, weight, row_weights, spec, scratch_bytes=2 << 20)
    exact = (row_weights * dense(student, teacher, weight, spec)).sum()
    found, wanted = gradients(result.loss, student, weight), gradients(exact, student, weight)
    for gradient, other in zip(found, wanted, strict=True):
        assert relative_error(gradient, other) < 1e-2


def test_equal_inputs_give_exactly_zero_and_the_weight_gradient_is_added_in_float32():
    student, teacher, weight, row_weights = inputs(ROWS, 16, VOCAB, torch.bfloat16)
    main_grad = torch.ones(VOCAB, 16)
    options = GradientOptions(weight_gradient=main_grad)
    same = student.detach().clone()
    spec = DivergenceSpec("jsd", entry_clip=0.05)
    result = fused(student, same, weight, row_weights, spec, scratch_bytes=SCRATCH, gradient_options=options)
    assert result.loss == 0
    assert (main_grad == 1).all()
    fused(student, teacher, weight, row_weights, spec, scratch_bytes=SCRATCH, gradient_options=options)
    leaves = [leaf.detach().double().requires_grad_() for leaf in (student, weight)]
    (wanted,) = gradients((row_weights * dense(leaves[0], teacher, leaves[1], spec)).sum(), leaves[1])
    assert relative_error(main_grad - 1, wanted) < 5e-3


def test_a_budget_below_one_group_of_rows_is_refused():
    with pytest.raises(UserError, match=r"loss\.scratch_mb"):
        fused(*inputs(ROWS, 16, VOCAB, torch.bfloat16), DivergenceSpec(), scratch_bytes=1500)
