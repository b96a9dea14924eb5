"""Qwen3 with routed experts in every layer."""

from __future__ import annotations

from megatron_copsd.hf.families.keys import (
    HIDDEN_OVER_HEADS,
    NO_OUTPUT_BIAS,
    SHARED,
    Family,
    Irrelevant,
    Only,
    Used,
    classes,
)

_AUXILIARY = Irrelevant("model.moe_aux_loss says it")

QWEN3_MOE = Family(
    name="qwen3_moe",
    qk_norm=True,
    keys={
        **SHARED,
        "architectures": classes("Qwen3MoeForCausalLM"),
        "vocab_size": Used("vocab_size", 151936),
        "hidden_size": Used("hidden", 2048),
        "intermediate_size": Used("ffn", 6144),
        "num_hidden_layers": Used("layers", 24),
        "num_attention_heads": Used("heads", 32),
        "num_key_value_heads": Used("kv_groups", 4),
        "head_dim": Used("head_dim", HIDDEN_OVER_HEADS, null=HIDDEN_OVER_HEADS),
        "max_position_embeddings": Used("max_positions", 32768),
        "rms_norm_eps": Used("norm_eps", 1e-6),
        "tie_word_embeddings": Used("tied", False),
        "attention_bias": NO_OUTPUT_BIAS,
        "num_experts": Used("experts", 128, spellings=("num_local_experts",)),
        "num_experts_per_tok": Used("experts_per_token", 8),
        "moe_intermediate_size": Used("moe_ffn", 768),
        "norm_topk_prob": Used("norm_topk_prob", False),
        "decoder_sparse_step": Only((1,), "every layer must have experts (1)"),
        "mlp_only_layers": Only((), "every layer must have experts ([])", each=True),
        "output_router_logits": _AUXILIARY,
        "router_aux_loss_coef": _AUXILIARY,
    },
)
