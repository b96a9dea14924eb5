"""Published models whose config.json is known here, so that planning needs no network."""

from __future__ import annotations

import os
from collections.abc import Mapping

from megatron_copsd.architecture import Architecture
from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.files import is_folder
from megatron_copsd.hf.read import architecture_from, read_architecture

_QWEN3: Mapping[str, object] = {
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def _dense(layers: int, hidden: int, ffn: int, heads: int, tied: bool) -> Mapping[str, object]:
    return {
        **_QWEN3,
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "tie_word_embeddings": tied,
    }


def _experts(layers: int, hidden: int, ffn: int, heads: int, moe_ffn: int) -> Mapping[str, object]:
    return {
        **_QWEN3,
        "model_type": "qwen3_moe",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": moe_ffn,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    }


# What decides the architecture in the config.json that each model was published with.
PUBLISHED: Mapping[str, Mapping[str, object]] = {
    "Qwen/Qwen3-0.6B": _dense(28, 1024, 3072, 16, tied=True),
    "Qwen/Qwen3-1.7B": _dense(28, 2048, 6144, 16, tied=True),
    "Qwen/Qwen3-4B": _dense(36, 2560, 9728, 32, tied=True),
    "Qwen/Qwen3-8B": _dense(36, 4096, 12288, 32, tied=False),
    "Qwen/Qwen3-14B": _dense(40, 5120, 17408, 40, tied=False),
    "Qwen/Qwen3-32B": _dense(64, 5120, 25600, 64, tied=False),
    "Qwen/Qwen3-30B-A3B": _experts(48, 2048, 6144, 32, moe_ffn=768),
    "Qwen/Qwen3-235B-A22B": _experts(94, 4096, 12288, 64, moe_ffn=1536),
}


def known_architecture(path: str) -> Architecture:
    """Return the architecture of a published model by its hub name, or of a Hugging Face folder; nothing is fetched.

    Raises:
        UserError: it is neither, or the folder's model is not supported.
    """
    if path in PUBLISHED and not os.path.isdir(path):
        return architecture_from(PUBLISHED[path], f"model.path ({path})")
    if is_folder(path):
        return read_architecture(path)
    rule = "is neither a folder with a config.json nor a model whose config.json is known here"
    raise UserError(describe("model.path", path, rule, f"Give a folder, or one of {', '.join(PUBLISHED)}."))
