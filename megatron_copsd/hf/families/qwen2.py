"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from megatron_copsd.hf.families.keys import HEADS, HIDDEN_OVER_HEADS, SHARED, Family, Irrelevant, Used, classes

QWEN2 = Family(
    name="qwen2",
    qkv_bias=True,
    keys={
        **SHARED,
        "architectures": classes("Qwen2ForCausalLM"),
        "vocab_size": Used("vocab_size", 151936),
        "hidden_size": Used("hidden", 4096),
        "intermediate_size": Used("ffn", 22016),
        "num_hidden_layers": Used("layers", 32),
        "num_attention_heads": Used("heads", 32),
        "num_key_value_heads": Used("kv_groups", 32, null=HEADS),
        "head_dim": Used("head_dim", HIDDEN_OVER_HEADS, null=HIDDEN_OVER_HEADS),
        "max_position_embeddings": Used("max_positions", 32768),
        "rms_norm_eps": Used("norm_eps", 1e-6),
        "tie_word_embeddings": Used("tied", False),
        "attention_bias": Irrelevant("every Qwen2 has biases on queries, keys and values, and on no other projection"),
    },
)
