"""Cutting HF tensors into shards and putting them together again."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_copsd.architecture import Architecture, Rope
from megatron_copsd.hf.cuts import shard, unshard
from megatron_copsd.hf.names import NameTable
from megatron_copsd.hf.read import FAMILIES

ARCHITECTURE = Architecture(
    family="qwen2",
    layers=2,
    hidden=12,
    ffn=24,
    heads=12,
    kv_groups=6,
    head_dim=4,
    vocab_size=131,
    max_positions=64,
    norm_eps=1e-6,
    rope=Rope(10000.0),
    tied=False,
    qkv_bias=True,
    qk_norm=False,
)
SHAPES = {
    "replicated": [(12,)],
    "vocab": [(131, 12)],
    "qkv": [(48, 12), (24, 12), (24, 12)],
    "gated": [(24, 12), (24, 12)],
    "row": [(12, 24)],
}


@pytest.mark.parametrize("cut", SHAPES)
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_round_trip_is_bitwise(cut: str, size: int) -> None:
    tensors = [torch.randn(shape) for shape in SHAPES[cut]]
    shards = [shard(cut, tensors, ARCHITECTURE, rank, size) for rank in range(size)]
    assert len({part.shape for part in shards}) == 1
    for before, after in zip(tensors, unshard(cut, shards, ARCHITECTURE), strict=True):
        assert torch.equal(before, after)


def test_qkv_bias_round_trip() -> None:
    tensors = [torch.randn(48), torch.randn(24), torch.randn(24)]
    shards = [shard("qkv", tensors, ARCHITECTURE, rank, 3) for rank in range(3)]
    for before, after in zip(tensors, unshard("qkv", shards, ARCHITECTURE), strict=True):
        assert torch.equal(before, after)


def test_qkv_interleaves_by_group() -> None:
    q, k, v = (torch.full((n, 1), float(i)) for i, n in enumerate((48, 24, 24)))
    merged = shard("qkv", [q, k, v], ARCHITECTURE, 0, 1).flatten().tolist()
    # Two query heads, then one key and one value head, of four rows each, for every group.
    assert merged == ([0.0] * 8 + [1.0] * 4 + [2.0] * 4) * 6


def test_gate_and_up_stay_together_in_a_shard() -> None:
    gate, up = torch.arange(24.0).unsqueeze(1), torch.arange(100.0, 124.0).unsqueeze(1)
    second = shard("gated", [gate, up], ARCHITECTURE, 1, 2).flatten().tolist()
    assert second == [*map(float, range(12, 24)), *map(float, range(112, 124))]


def test_vocabulary_padding_is_zero_and_dropped() -> None:
    embedding = torch.randn(131, 12)
    parts = [shard("vocab", [embedding], ARCHITECTURE, rank, 3) for rank in range(3)]
    assert all(part.shape == (64, 12) for part in parts)
    assert parts[2][131 - 128 :].abs().max() == 0


def test_every_family_names_every_tensor_once() -> None:
    for family in FAMILIES.values():
        own = {"family": family.name, "qkv_bias": family.qkv_bias, "qk_norm": family.qk_norm}
        experts = 6 if "num_experts" in family.keys else 0
        for tied in (False, True):
            table = NameTable(dataclasses.replace(ARCHITECTURE, **own, tied=tied, experts=experts))
            names = table.hf_names(2)
            assert len(names) == len(set(names))
            assert ("lm_head.weight" in names) == (not tied)
