"""Which modules the transformer layers are made of: Transformer Engine's, or torch's."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_copsd.errors import UserError, describe
from megatron_copsd.model.attention import SdpaAttention
from megatron_copsd.model.experts import with_balanced_router


class RMSNorm(torch.nn.RMSNorm):
    """y = x / sqrt(mean(x^2) + eps) * w over the last dimension, with statistics in float32 (arXiv 1910.07467).

    Under sequence parallelism each tensor-parallel rank normalises its own positions, so its gradient of w is a part of
    the sum; the attribute ``sequence_parallel`` has Megatron add the parts up. Megatron's own wrapper of torch's norm
    refuses sequence parallelism because it lacks the attribute.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)
        weight: Any = self.weight
        weight.sequence_parallel = config.sequence_parallel


def use_transformer_engine(implementation: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Decide between the two implementations.

    Raises:
        UserError: Transformer Engine is asked for and cannot be imported, there is no GPU, or the dtype is float32,
            which its fused attention does not take.
    """
    possible = device.type == "cuda" and dtype is not torch.float32 and HAVE_TE
    if implementation == "transformer_engine" and not possible:
        rule = "needs a GPU, model.dtype other than float32, and a transformer_engine that imports"
        raise UserError(describe("model.implementation", implementation, rule, "Use torch or auto."))
    return possible and implementation != "torch"


def block_spec(config: TransformerConfig, transformer_engine: bool, chunk: int) -> TransformerBlockSubmodules:
    """Return the spec of the layers and final norm of one of this pipeline stage's chunks."""
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
        norm = TENorm
    else:
        layer = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
        )
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = SdpaAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    if config.num_moe_experts:
        with_balanced_router(layer)
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, chunk), layer_norm=norm)
