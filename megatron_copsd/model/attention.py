"""Causal self-attention on ``scaled_dot_product_attention``, for the torch implementation of the layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_copsd.model.context import context_attention
from megatron_copsd.model.packing import packed_attention


class SdpaAttention(MegatronModule):
    """Core attention that never holds a [T, T] matrix, unlike Megatron's own ``DotProductAttention``.

    Sequences are padded on the right, so the causal mask alone keeps real tokens from seeing padding; or packed.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: object = None,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type is AttnMaskType.causal
        assert attention_type == "self"
        self.softmax_scale = softmax_scale
        self.context_group = parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [T, B, heads of this rank, head_dim]; [T, heads, head_dim] where packed.
            key, value: the same with the key-value groups of this rank as heads.
            attention_mask, attn_mask_type: ignored; attention is causal.
            attention_bias: not supported, must be None.
            packed_seq_params: where packed sequences begin.

        Returns:
            [T, B, heads of this rank * head_dim]; where packed, shaped as ``query``.
        """
        assert attention_bias is None
        if self.config.context_parallel_size > 1:
            return self._over_context_ranks(query, key, value, packed_seq_params)
        repeats = query.shape[-2] // key.shape[-2]
        if repeats > 1:
            # The fused CPU kernel takes equal head counts only; enable_gqa would send it to the [T, T] fallback.
            key = key.repeat_interleave(repeats, dim=-2)
            value = value.repeat_interleave(repeats, dim=-2)
        if packed_seq_params is not None:
            return packed_attention(query, key, value, packed_seq_params, self.softmax_scale)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.softmax_scale)
        return context.permute(2, 0, 1, 3).flatten(2)

    def _over_context_ranks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams | None
    ) -> torch.Tensor:
        """Attend where this rank holds a part of each sequence; shapes as in ``forward``."""
        if packed is None:
            lengths = [len(query) * self.config.context_parallel_size]
            return context_attention(query, key, value, lengths, self.context_group, self.softmax_scale).flatten(2)
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        lengths = packed.cu_seqlens_q.diff().tolist()
        return context_attention(query, key, value, lengths, self.context_group, self.softmax_scale).squeeze(1)
