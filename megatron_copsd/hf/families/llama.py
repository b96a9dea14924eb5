"""Llama 2 and 3, and what shares their model_type, such as SmolLM2."""

from __future__ import annotations

from megatron_copsd.hf.families.keys import (
    HEADS,
    HIDDEN_OVER_HEADS,
    NO_OUTPUT_BIAS,
    SHARED,
    Family,
    Only,
    Used,
    classes,
)

LLAMA = Family(
    name="llama",
    whole_heads=True,
    keys={
        **SHARED,
        "architectures": classes("LlamaForCausalLM"),
        # Servers would have one, transformers has none.
        "sliding_window": Only((None,), "sliding-window attention is not supported"),
        "vocab_size": Used("vocab_size", 32000),
        "hidden_size": Used("hidden", 4096),
        "intermediate_size": Used("ffn", 11008),
        "num_hidden_layers": Used("layers", 32),
        "num_attention_heads": Used("heads", 32),
        "num_key_value_heads": Used("kv_groups", HEADS, null=HEADS),
        "head_dim": Used("head_dim", HIDDEN_OVER_HEADS, null=HIDDEN_OVER_HEADS),
        "max_position_embeddings": Used("max_positions", 2048),
        "rms_norm_eps": Used("norm_eps", 1e-6),
        "tie_word_embeddings": Used("tied", False),
        "attention_bias": NO_OUTPUT_BIAS,
    },
)
