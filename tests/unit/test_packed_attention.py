"""Packed attention against a dense block-diagonal mask, in values and gradients."""

from __future__ import annotations

import pytest
import torch

from megatron_copsd import platform

with platform.importing_megatron():
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_copsd.model.packing import packed_attention

LENGTHS = (5, 1, 12, 3)


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[T, heads, head_dim] of each, with the whole [T, T] mask."""
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    mask = (sequence[:, None] == sequence[None, :]).tril().to(query.device)
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(dim=-1), value)


def compare(device: str, dtype: torch.dtype, tolerance: float) -> None:
    starts = torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)
    packed = PackedSeqParams("thd", starts, starts, max_seqlen_q=max(LENGTHS), max_seqlen_kv=max(LENGTHS))
    generator = torch.Generator().manual_seed(4)
    inputs = [torch.randn(sum(LENGTHS), 2, 16, generator=generator).to(device, dtype) for _ in range(4)]
    *qkv, weight = inputs
    own = [tensor.clone().requires_grad_() for tensor in qkv]
    reference = [tensor.double().requires_grad_() for tensor in qkv]
    out, expected = packed_attention(*own, packed, None), dense(*reference)
    out.backward(weight)
    expected.backward(weight.double())
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    for tensor, other in zip(own, reference, strict=True):
        torch.testing.assert_close(tensor.grad.double(), other.grad, rtol=tolerance, atol=tolerance)


def test_one_sequence_after_the_other() -> None:
    compare("cpu", torch.float64, 1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_on_a_gpu(dtype: torch.dtype, tolerance: float) -> None:
    compare("cuda", dtype, tolerance)
