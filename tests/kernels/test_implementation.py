"""Which implementation ``auto`` takes, and what a run says of it."""

from __future__ import annotations

import pytest
import torch
from divergence_cases import inputs
from torch import Tensor

from copsd_kernels.gemm import scratch_shape
from copsd_kernels.scratch import WORK_BUFFERS, ColumnPlan, plan_chunks
from megatron_copsd.errors import UserError
from megatron_copsd.loss.implementation import CHOICES, choose, explain, plan_scratch

MIB = 2**20


class OnCuda(Tensor):
    """A weight that says it is on a GPU; nothing else is asked of it."""

    is_cuda = True
    device = torch.device("cuda")


def weight_on_cuda(rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((), dtype=dtype).expand(rows, hidden).as_subclass(OnCuda)


def test_the_cpu_takes_plain_torch():
    *_, weight, _ = inputs()
    assert choose("auto", weight, None).implementation == "torch"


@pytest.mark.parametrize(
    ("dtype", "scratch_mb", "top_k", "taken"),
    [
        (torch.bfloat16, None, False, "chunk"),
        (torch.float32, None, False, "chunk"),
        (torch.float64, None, False, "torch"),
        (torch.bfloat16, 128, False, "streaming"),
        (torch.bfloat16, 1, False, "streaming"),
        (torch.bfloat16, 128, True, "chunk"),
    ],
)
def test_a_gpu_takes_streaming_where_chunks_would_be_small(dtype, scratch_mb, top_k, taken):
    weight = weight_on_cuda(151_936, 4096, dtype)
    budget = None if scratch_mb is None else scratch_mb * MIB
    assert choose("auto", weight, budget, top_k=top_k).implementation == taken


def test_every_line_of_the_table_can_be_taken():
    budgets = [None, 64 * MIB]
    dtypes = [torch.bfloat16, torch.float64]
    taken = {id(choose("auto", weight_on_cuda(151_936, 4096, d), b)) for d in dtypes for b in budgets}
    taken.add(id(choose("auto", torch.empty(8, 4), None)))
    assert taken == {id(choice) for choice in CHOICES}


def test_a_forced_choice_is_kept_and_said():
    weight = torch.empty(()).expand(49_152, 576)
    text = explain("torch", weight, 512, 2, 64 * MIB)
    plan = plan_chunks(scratch_shape(weight, 512, 2, WORK_BUFFERS["torch"], True), 64 * MIB)
    assert "loss: torch (loss.implementation asks for it)" in text
    assert f"{plan.rows} rows of logits at a time, {plan.bytes / MIB:.1f} MiB" in text
    assert plan.bytes <= 64 * MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streaming_plans_within_its_budget(dtype):
    weight = torch.empty((), dtype=dtype).expand(49_152, 576)
    plan = plan_scratch("streaming", weight, 1024, 2, 32 * MIB)
    assert isinstance(plan, ColumnPlan)
    assert plan.columns % 128 == 0
    assert 16 * MIB < plan.bytes <= 32 * MIB
    with pytest.raises(UserError, match=r"loss\.scratch_mb.*one column"):
        plan_scratch("streaming", weight, 1024, 2, 1024)
    assert plan_scratch("streaming", weight, 1024, 2, 1024, differentiate=False).bytes == 0
