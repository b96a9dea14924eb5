"""Small but real inputs: HF model folders of each family, problems, and configurations over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from small_tokenizer import small_tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CONFIG_CLASSES: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
}
_MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    "llama": LlamaForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "qwen3_moe": Qwen3MoeForCausalLM,
}


def make_model(folder: Path, family: str = "qwen3", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a random model of ``family`` with its tokenizer; ``changes`` go into its configuration."""
    tokenizer = small_tokenizer()
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        # Larger than usual, so that random models have opinions and a wrong gradient can't hide.
        "initializer_range": 0.2,
    }
    if family == "qwen2":
        del sizes["head_dim"]  # Qwen2 derives it
        sizes["vocab_size"] += 1  # transformers' tokenizer of the family brings <|endoftext|>
    if family == "qwen3_moe":
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = _MODEL_CLASSES[family](CONFIG_CLASSES[family](**{**sizes, **changes})).to(dtype)
        for name, parameter in model.named_parameters():
            # transformers starts biases at 0 and norms at 1, which would hide a bias or norm that was left out.
            if name.endswith("bias") or "norm" in name:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_problems(path: Path, count: int = 24) -> Path:
    """Write problems in the released layout: half Swahili, half English, additions with worked solutions."""
    rows = []
    for i in range(count):
        a, b = 2 + i % 7, 3 + i % 5
        english = f"Asha has {a} mangoes and buys {b} more. How many mangoes has she?"
        swahili = f"Asha ana maembe {a} na ananunua {b} zaidi. Ana maembe mangapi?"
        is_swahili = i % 2 == 0
        rows.append(
            {
                "source": "test",
                "problem": english,
                "solution": f"{a} + {b} = {a + b}. #### {a + b}",
                "Answer": str(a + b),
                "problem_translated": swahili if is_swahili else english,
                "language": "SWA" if is_swahili else "EN",
                "language_short": "sw" if is_swahili else "en",
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(folder: Path, model: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Return a small complete configuration as a tree; ``sections`` are merged into it key by key."""
    problems = write_problems(folder / "problems.jsonl")
    source = {"path": str(problems), "layout": "released", "language": "SWA"}
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": "tiny", "dir": str(folder / "run"), "steps": 3, "seed": 3},
        "model": {"path": str(model), "dtype": "float32", "implementation": "torch"},
        "data": {"train": [source]},
        "prompt": {"template": "plain"},
        "rollout": {"prompts_per_step": 6, "max_response_tokens": 12, "temperature": 1.0},
        "optimizer": {"lr": 1e-3, "micro_batch_size": 2},
        "log": {"tensorboard": False},
    }
    for section, changes in sections.items():
        tree[section] = {**tree.get(section, {}), **changes}
    return tree


def write_config(folder: Path, tree: dict[str, Any], name: str = "config.yaml") -> Path:
    """Write a configuration tree as YAML."""
    path = folder / name
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path
