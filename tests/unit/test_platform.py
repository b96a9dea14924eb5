"""The mode in which Megatron-Core runs on a CPU."""

from __future__ import annotations

import pytest
import torch

from megatron_copsd.platform import _CudaMeansCpu


def test_norms_of_large_gradients_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(1 << 24, generator=generator) * torch.rand(1 << 24, generator=generator) ** 4
    exact = float(gradient.double().norm())
    with _CudaMeansCpu():
        found = torch.norm(gradient)
        rows = torch.norm(gradient.view(4, -1), dim=1)
    assert found.dtype is torch.float32
    assert float(found) == pytest.approx(exact, rel=1e-7)
    assert float(torch.norm(gradient)) != pytest.approx(exact, rel=1e-5), "torch has become exact by itself"
    assert rows.shape == (4,)
