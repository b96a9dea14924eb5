"""What servers should say of the weights they were sent; tests/sglang/test_verify.py asks real ones."""

from __future__ import annotations

import hashlib

import pytest
import torch

from megatron_copsd.rollout.engine import Bucket
from megatron_copsd.sync.checksums import WeightChecksums, mixed_words

ATTENTION = "model.layers.0.self_attn"


# What SGLang 0.5.23's own kernel says of these bytes (under Triton's interpreter): of a word and of a part of one, of a
# tile, of a word more, and of tiles of which the last is short.
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, 0x3D93A6540B54EF2A),
        (4, 0x84EC9EF21925A44A),
        (1000, 0x97F1A6E278F638BE),
        (32768, 0xA7C0B352E5389EC4),
        (32772, 0xBF4541E67DBE83F9),
        (200003, 0x32FDC9D3BD862B2B),
    ],
)
def test_the_checksum_of_gpus(size, expected, monkeypatch):
    data = (torch.arange(size) * 7919 % 251).to(torch.uint8)
    assert mixed_words(data) == expected
    monkeypatch.setattr("megatron_copsd.sync.checksums._TILES_AT_ONCE", 2)
    assert mixed_words(data) == expected


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def said(*ranks: dict[str, torch.Tensor]) -> list[tuple[int, dict[str, str]]]:
    return [(rank, {name: digest(tensor) for name, tensor in held.items()}) for rank, held in enumerate(ranks)]


def watched(tensors: dict[str, torch.Tensor], ranks: int, kv_groups: int, dtype: torch.dtype) -> WeightChecksums:
    checksums = WeightChecksums(ranks, kv_groups, dtype, on_gpu=False)
    one_each = (Bucket((name,), (tensor,)) for name, tensor in tensors.items())
    assert [bucket.names[0] for bucket in checksums.watch(one_each, ())] == list(tensors)
    return checksums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_and_cut_as_a_server_of_four_ranks_has_them(dtype):
    torch.manual_seed(0)
    q, k, v, o = torch.randn(16, 8), torch.randn(4, 8), torch.randn(4, 8), torch.randn(8, 16)
    embedding, norm = torch.randn(130, 8), torch.randn(8)
    sent = {
        f"{ATTENTION}.v_proj.weight": v,
        f"{ATTENTION}.q_proj.weight": q,
        "model.embed_tokens.weight": embedding,
        f"{ATTENTION}.o_proj.weight": o,
        f"{ATTENTION}.k_proj.weight": k,
        "model.norm.weight": norm,
    }
    checksums = watched(sent, ranks=4, kv_groups=2, dtype=dtype)
    q, k, v, o, embedding, norm = (tensor.to(dtype) for tensor in (q, k, v, o, embedding, norm))
    padded = torch.cat([embedding, torch.zeros(62, 8, dtype=dtype)])  # 192 rows: of 64, and of 4 ranks
    held = [
        {
            # Two key-value heads of two rows, each held by two ranks.
            f"{ATTENTION}.qkv_proj.weight": torch.cat(
                [q[4 * rank : 4 * rank + 4], k[2 * (rank // 2) :][:2], v[2 * (rank // 2) :][:2]]
            ),
            f"{ATTENTION}.o_proj.weight": o[:, 4 * rank : 4 * rank + 4],
            "model.embed_tokens.weight": padded[48 * rank : 48 * rank + 48],
            "model.norm.weight": norm,
        }
        for rank in range(4)
    ]
    assert checksums.differences(said(*held)) == []
    held[3]["model.norm.weight"] = norm + 2**-4
    assert checksums.differences(said(*held)) == ["model.norm.weight (rank 3)"]
    assert checksums.differences(said(*held[:3])) == ["rank 3"], "a rank that says nothing"
    assert len(checksums.differences(said(*held[:3], held[3], held[3]))) == 1 + 4, "a rank too many"


@pytest.mark.parametrize("missing", ["sent", "held"])
def test_what_only_one_side_has(missing):
    tensors = {"model.norm.weight": torch.ones(4), "model.layers.0.input_layernorm.weight": torch.ones(4)}
    fewer = {"model.norm.weight": torch.ones(4)}
    sent, held = (fewer, tensors) if missing == "sent" else (tensors, fewer)
    checksums = watched(sent, ranks=1, kv_groups=1, dtype=torch.float32)
    assert checksums.differences(said(held)) == ["model.layers.0.input_layernorm.weight (rank 0)"]


def test_a_part_that_never_came():
    with pytest.raises(AssertionError, match="qkv_proj"):
        watched({f"{ATTENTION}.q_proj.weight": torch.ones(2, 2)}, ranks=1, kv_groups=1, dtype=torch.float32)
