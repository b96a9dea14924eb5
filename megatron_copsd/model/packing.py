"""Attention among sequences that lie behind each other in one row, without compute between them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_copsd.types import Microbatch


def packed_sequences(batch: Microbatch, config: TransformerConfig, device: torch.device) -> PackedSeqParams | None:
    """Tell Megatron where the sequences of a packed microbatch begin; None where they are padded.

    Megatron restarts rotary positions there. The torch implementation needs the lengths in Python, in each layer: it
    gets them in host memory, so that no layer waits for the device.
    """
    if batch.packed_lengths is None:
        return None
    starts = torch.tensor((0, *batch.packed_lengths), dtype=torch.int32).cumsum(dim=0, dtype=torch.int32)
    if config.transformer_impl == "transformer_engine":
        starts = starts.to(device)
    longest = max(batch.packed_lengths)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams, scale: float | None
) -> torch.Tensor:
    """Causal attention of each sequence to itself.

    Args:
        query, key, value: [T, heads of this rank, head_dim]; all have the same number of heads.
        packed: starts of the sequences, in host memory.
        scale: of the scores; None for 1 / sqrt(head_dim).

    Returns:
        [T, heads of this rank, head_dim].
    """
    flash = _flash_attention()
    if flash is not None and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        starts = packed.cu_seqlens_q.to(query.device, non_blocking=True)
        longest = packed.max_seqlen_q
        return flash(query, key, value, starts, starts, longest, longest, scale=scale, window_size=(-1, 0))
    lengths = packed.cu_seqlens_q.diff().tolist()
    contexts = []
    for parts in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        q, k, v = (part.transpose(0, 1)[None] for part in parts)
        contexts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale))
    return torch.cat([context[0].transpose(0, 1) for context in contexts])


def _flash_attention() -> Callable[..., Any] | None:
    """Return torch's attention over sequences of varying length, or None where this version has none that fits.

    torch 2.10 had it with other arguments.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    fits = {"scale", "window_size"} <= set(inspect.signature(varlen_attn).parameters)
    return varlen_attn if fits else None
