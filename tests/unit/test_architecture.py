"""config.json under every spelling against what transformers makes of it, and what is refused there."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONFIG_CLASSES
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_copsd import platform
from megatron_copsd.architecture import Architecture, LinearScaling, Llama3Scaling, Rope
from megatron_copsd.errors import UserError
from megatron_copsd.hf.families.keys import Irrelevant, Only, Used
from megatron_copsd.hf.folder import resolve_folder
from megatron_copsd.hf.read import FAMILIES, architecture_from, read_architecture
from megatron_copsd.plan.published import known_architecture

with platform.importing_megatron():
    from megatron_copsd.model.build import inverse_frequencies

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 512,
}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "sizes": SIZES,
    "untied, wide heads": {**SIZES, "head_dim": 32, "tie_word_embeddings": False, "rms_norm_eps": 1e-5},
    "tied, linear": {**SIZES, "tie_word_embeddings": True, "rope_parameters": LINEAR},
    "llama3": {**SIZES, "head_dim": 64, "rope_parameters": LLAMA3},
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}


@functools.cache
def of_attention(family: str) -> tuple[bool, bool]:
    """Whether transformers' layers have biases on the queries, and norms of queries and keys."""
    with torch.device("meta"):
        attention = AutoModelForCausalLM.from_config(CONFIG_CLASSES[family](**SIZES)).model.layers[0].self_attn
    return attention.q_proj.bias is not None, hasattr(attention, "q_norm")


def expected(config: PretrainedConfig) -> Architecture:
    """The same, as attributes of transformers' object say it."""
    family = config.model_type
    moe = family == "qwen3_moe"
    biases, norms = of_attention(family)
    rope = config.rope_parameters
    scaling: LinearScaling | Llama3Scaling | None = None
    if rope["rope_type"] == "linear":
        scaling = LinearScaling(rope["factor"])
    if rope["rope_type"] == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = Llama3Scaling(*(rope[name] for name in names))
    return Architecture(
        family=family,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_groups=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        rope=Rope(rope["rope_theta"], scaling),
        tied=config.tie_word_embeddings,
        qkv_bias=biases,
        qk_norm=norms,
        experts=config.num_experts if moe else 0,
        experts_per_token=config.num_experts_per_tok if moe else 0,
        moe_ffn=config.moe_intermediate_size if moe else 0,
        norm_topk_prob=moe and config.norm_topk_prob,
    )


def save(folder: Path, family: str, **changes: Any) -> PretrainedConfig:
    experts = EXPERTS if family == "qwen3_moe" and changes else {}
    config = CONFIG_CLASSES[family](**{**changes, **experts})
    config.save_pretrained(folder)
    return config


def rewrite(folder: Path, **changes: Any) -> None:
    """Change a config.json; a key with None goes."""
    file = folder / "config.json"
    content = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    kept = {key: value for key, value in content.items() if key not in changes or value is not None}
    file.write_text(json.dumps(kept), encoding="utf-8")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_configurations(tmp_path: Path, family: str, variant: str) -> None:
    save(tmp_path, family, **VARIANTS[variant])
    assert read_architecture(str(tmp_path)) == expected(AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_older_spellings(tmp_path: Path, family: str) -> None:
    """As transformers 4 wrote: ``rope_theta`` and ``rope_scaling``, ``num_experts``, ``torch_dtype``."""
    old = {"rope_parameters": None, "dtype": None, "torch_dtype": "bfloat16", "rope_theta": 12345}
    scaling = {**LLAMA3, "type": "llama3"}
    del scaling["rope_type"], scaling["rope_theta"]
    for rope_scaling in ({"type": "linear", "factor": 2.0}, scaling, None):
        save(tmp_path, family, **SIZES)
        experts = {"num_local_experts": None, "num_experts": 6} if family == "qwen3_moe" else {}
        rewrite(tmp_path, **old, **experts)
        if rope_scaling:
            rewrite(tmp_path, rope_scaling=rope_scaling)
        read = read_architecture(str(tmp_path))
        assert read == expected(AutoConfig.from_pretrained(tmp_path))
        assert read.rope.theta == 12345


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}), encoding="utf-8")
    config = AutoConfig.from_pretrained(tmp_path)
    assert read_architecture(str(tmp_path)) == expected(config)
    filled = config.to_dict()
    for key, use in FAMILIES[family].keys.items():
        if isinstance(use, Only) and not use.each and key in filled:
            assert filled[key] == use.allowed[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_table_knows_every_key_that_transformers_writes(tmp_path: Path, family: str) -> None:
    save(tmp_path, family, dtype="bfloat16", **SIZES)
    table = FAMILIES[family].keys
    assert not {field.name for field in fields(CONFIG_CLASSES[family])} - table.keys()
    assert not GenerationConfig().to_dict().keys() - table.keys() - {"_from_model_config"}
    spellings = {name for use in table.values() if isinstance(use, Used) for name in use.spellings}
    assert not json.loads((tmp_path / "config.json").read_text(encoding="utf-8")).keys() - table.keys() - spellings
    assert all(use.why for use in table.values() if isinstance(use, Irrelevant))
    # And it fills every field of the architecture that is not the family's own, each once.
    filled = [use.field for use in table.values() if isinstance(use, Used)]
    of_experts = set() if family == "qwen3_moe" else {"experts", "experts_per_token", "moe_ffn", "norm_topk_prob"}
    own = {"family", "qkv_bias", "qk_norm", "rope"} | of_experts
    assert sorted(filled) == sorted({field.name for field in fields(Architecture)} - own)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "llama",
            {"model_type": "gpt2"},
            r"model_type: 'gpt2': this family has no weight table\. Give a model of one of llama",
        ),
        ("llama", {"model_type": None}, r"model_type: None: this family has no weight table"),
        ("llama", {"hidden_act": "gelu"}, r"hidden_act: 'gelu': only silu .*Give a model whose hidden_act is 'silu'\."),
        ("llama", {"mlp_bias": True}, r"mlp_bias: True: biases in the feed-forward layers"),
        ("qwen2", {"use_sliding_window": True}, r"use_sliding_window: True: sliding-window attention"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types: .*sliding-window"),
        ("qwen3", {"attention_bias": True}, r"attention_bias: True: a bias on the attention output projection"),
        ("llama", {"pretraining_tp": 2}, r"pretraining_tp: 2: only 1 is supported"),
        ("qwen3_moe", {"num_experts": 4}, r"num_local_experts: 6: says something else than num_experts = 4"),
        ("qwen3", {"hidden_size": "48"}, r"hidden_size: '48': must be a whole number above 0"),
        ("qwen3", {"num_hidden_layers": 0}, r"num_hidden_layers: 0: must be a whole number above 0"),
        ("qwen3", {"num_hidden_layers": True}, r"num_hidden_layers: True: must be a whole number above 0"),
        ("qwen3", {"rms_norm_eps": -1.0}, r"rms_norm_eps: -1\.0: must be a number above 0"),
        ("qwen3", {"tie_word_embeddings": "no"}, r"tie_word_embeddings: 'no': must be true or false"),
        ("qwen2", {"hidden_size": 50}, r"hidden_size: 50: must be a multiple of num_attention_heads = 6"),
        ("qwen3", {"head_dim": 7}, r"head_dim: 7: rotary positions turn pairs"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, r"rope_type: 'yarn': this rotary scaling"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, r"rope factor: None: must be a number above 0"),
        ("llama", {"rope_scaling": LINEAR}, r"rope_scaling: .*says something else than rope_parameters"),
        ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor: 0\.5: rotary positions of a part"),
        ("qwen3", {"rope_parameters": {"full_attention": LINEAR}}, r"rope_parameters: .*the same for all layers"),
        ("llama", {"num_labels": 10**15}, r"num_labels: 1000000000000000: no model has so many labels"),
        ("qwen3", {"initializer_range": -0.02}, r"initializer_range: -0\.02: must be a number from 0 to 1"),
        ("qwen3", {"original_max_position_embeddings": 64}, r"original_max_position_embeddings: 64: means nothing"),
        ("llama", {"is_causal": False}, r"is_causal: False: only causal attention is supported\. Give a model whose"),
        (
            "qwen3",
            {"quantization_config": {"quant_method": "fp8"}},
            r"quantization_config: .*Give the unquantised model",
        ),
        ("llama", {"auto_map": {"AutoModel": "x.Y"}}, r"auto_map: .*code for it, which is not run\. Give another"),
        ("llama", {"sliding_window": 4096}, r"sliding_window: 4096: sliding-window attention"),
        ("qwen2", {"architectures": ["Qwen2ForSequenceClassification"]}, r"architectures: .*Give a Qwen2ForCausalLM\."),
        ("qwen3", {"layer_types": ["full_attention"]}, r"layer_types: .*a kind for each of 3 layers"),
        (
            "qwen3",
            {"per_layer_config": {"0": {"num_key_value_heads": 1}}},
            r"per_layer_config: .*differ from each other",
        ),
        ("qwen3", {"output_attentions": True}, r"output_attentions: True: changes what transformers' model returns"),
        (
            "llama",
            {"rms_norm_epsilon": 1e-6},
            r"rms_norm_epsilon: 1e-06: no key that llama .*Did you mean 'rms_norm_eps'",
        ),
        (
            "llama",
            {"logits_scaling": 8, "zz": 1},
            r"logits_scaling: 8: no key .*nor are zz.*Remove it if the model does",
        ),
        ("llama", {"vocab_size": 10**15}, r"vocab_size: 1000000000000000: must be at most"),
        ("llama", {"vocab_size": 1e15}, r"vocab_size: 1000000000000000\.0: must be a whole number above 0"),
        ("llama", {"num_hidden_layers": 10**9}, r"num_hidden_layers: 1000000000: must be at most 10000"),
        ("llama", {"rms_norm_eps": float("nan")}, r"rms_norm_eps: nan: must be a number above 0"),
        ("llama", {"rms_norm_eps": [1e-6]}, r"rms_norm_eps: \[1e-06\]: must be a number above 0"),
        ("llama", {"rms_norm_eps": 5}, r"rms_norm_eps: 5\.0: must be a number far below 1"),
        ("qwen3", {"num_key_value_heads": 4}, r"num_key_value_heads: 4: must divide num_attention_heads = 6"),
        ("qwen3_moe", {"num_experts_per_tok": 7}, r"num_experts_per_tok: 7: must not exceed the model's 6 experts"),
        ("llama", {"rope_parameters": {"rope_theta": 0}}, r"rope_theta: 0: must be a number above 0"),
        ("llama", {"rope_parameters": {"rope_theta": 10**400}}, r"rope_theta: 1000.*: must be a number above 0"),
        ("llama", {"rope_theta": 7.0}, r"rope_theta: 7\.0: says something else than rope_theta = 10000\.0"),
        ("llama", {"rope_parameters": "linear"}, r"rope_parameters: 'linear': must be an object"),
        ("llama", {"rope_parameters": []}, r"rope_parameters: \[\]: must be an object"),
        ("llama", {"rope_parameters": {"rope_type": ["linear"]}}, r"rope_type: \['linear'\]: this rotary scaling"),
        (
            "llama",
            {"rope_parameters": {**LINEAR, "type": "llama3"}},
            r"type: 'llama3': says something else than rope_type",
        ),
        (
            "llama",
            {"rope_parameters": {"factor": 2.0}},
            r"rope_parameters\.factor: 2\.0: means nothing .*correct rope_type",
        ),
        (
            "llama",
            {"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}},
            r"partial_rotary_factor: 0\.5: .*a part",
        ),
        ("llama", {"rope_parameters": {**LLAMA3, "partial_rotary_factor": True}}, r"partial_rotary_factor: True"),
        ("llama", {"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}}, r"rope low_freq_factor: 4\.0: must be"),
        ("llama", {"rope_parameters": {**LLAMA3, "factor": "8"}}, r"rope factor: '8': must be a number above 0"),
        ("llama", {"eos_token_id": [1, 131]}, r"eos_token_id: \[1, 131\]: must be a token id from 0 to 130 or a list"),
        ("llama", {"eos_token_id": "2"}, r"eos_token_id: '2': must be a token id"),
        ("llama", {"bos_token_id": True}, r"bos_token_id: True: must be a token id"),
        ("llama", {"pad_token_id": [0]}, r"pad_token_id: \[0\]: must be a token id from -1 to 130\."),
    ],
)
def test_refusals(tmp_path: Path, family: str, changes: dict[str, Any], message: str) -> None:
    save(tmp_path, family, **SIZES)
    rewrite(tmp_path, **changes)
    with pytest.raises(UserError, match=r"model\.path \(.*\) config\.json: " + message):
        read_architecture(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"model_type": ', r"not JSON"),
        ("[]", r"not an object, but list"),
        ("", r"not JSON"),
        ("[" * 100_000, r"not JSON"),
        ('{"model_type": "llama", "model_type": "qwen3"}', r"'model_type' stands there twice"),
        (b"\xff\xfe{", r"not JSON"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: str | bytes, why: str) -> None:
    with pytest.raises(UserError, match=r"the model has no config\.json"):
        read_architecture(str(tmp_path))
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"config\.json could not be read \({why}.*Download or convert"):
        read_architecture(str(tmp_path))


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config\.json could not be read \(not a file\)"):
        read_architecture(str(tmp_path))


@pytest.mark.parametrize("name", ["adapter_config.json", "quantize_config.json", "hf_quant_config.json"])
def test_what_else_says_what_the_model_is(tmp_path: Path, name: str) -> None:
    save(tmp_path, "llama", **SIZES)
    (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=rf"'{name}': .*(adapter.*Merge it|quantised.*Give the unquantised)"):
        read_architecture(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("./modle", r"is no folder here\. Correct the path"),
        ("modle", r"is no folder here\. Correct the path"),
        ("runs/x/hf", r"is no folder here\. Correct the path"),
        ("/nowhere/at/all", r"is no folder here\. Correct the path"),
        ("here/modle", r"is no folder here, though here/ is\. Correct it"),
        ("~/model", r"is no folder here: ~ is taken as it stands\. Write the whole path"),
        ("file", r"is not a folder that can be read"),
        ("a\0b", r"is no folder here"),
        ("x" * 300, r"is no folder here"),
    ],
)
def test_mistyped_paths_are_not_looked_for_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, rule: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "file").write_text("", encoding="utf-8")
    for read in (read_architecture, resolve_folder, known_architecture):
        with pytest.raises(UserError, match=rf"^model\.path: .*: {rule}"):
            read(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    save(tmp_path / "model", "llama", **SIZES)
    (tmp_path / "model").chmod(0)
    with pytest.raises(UserError, match=r"the folder may not be read\. Change its permissions"):
        read_architecture(str(tmp_path / "model"))


# What hub models have beside the sizes, each of its transformers' time.
PUBLISHED_KEYS: dict[str, dict[str, Any]] = {
    "llama 2": {
        "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02, "model_type": "llama", "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0", "use_cache": True, "pad_token_id": -1, "max_sequence_length": 2048,
    },
    "llama 3.2": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128,
        "eos_token_id": [101, 108, 109], "head_dim": 8, "hidden_act": "silu", "initializer_range": 0.02,
        "mlp_bias": False, "model_type": "llama", "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": True,
    },
    "smollm2": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.041666666666666664, "is_llama_config": True,
        "mlp_bias": False, "model_type": "llama", "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "transformers_version": "4.42.3", "use_cache": True,
    },
    "smollm2 of a GGUF file": {
        "_model_name_or_path": "Smollm2 135M 8k", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "model_type": "llama", "pad_token_id": None, "unk_token_id": 0, "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 100000, "rope_type": "default"}, "tie_word_embeddings": True,
    },
    "qwen2.5": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 43, "eos_token_id": 45,
        "hidden_act": "silu", "initializer_range": 0.02, "max_window_layers": 21, "model_type": "qwen2",
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": True, "use_mrope": False,
        "use_sliding_window": False,
    },
    "qwen3 of transformers 4.56": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "dtype": "bfloat16",
        "eos_token_id": 45, "head_dim": 128, "hidden_act": "silu", "initializer_range": 0.02,
        "layer_types": ["full_attention"] * 3, "max_window_layers": 3, "model_type": "qwen3", "pad_token_id": 43,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
        "tie_word_embeddings": False, "transformers_version": "4.56.1", "unsloth_fixed": True, "use_cache": False,
        "use_sliding_window": False,
    },
    "qwen3 with experts": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 43, "decoder_sparse_step": 1, "eos_token_id": 45, "head_dim": 128, "hidden_act": "silu",
        "initializer_range": 0.02, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8,
        "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("model", PUBLISHED_KEYS)
def test_what_hub_models_say_is_known(tmp_path: Path, model: str) -> None:
    content = {**SIZES, **PUBLISHED_KEYS[model]}
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    assert read_architecture(str(tmp_path)) == expected(AutoConfig.from_pretrained(tmp_path))


def test_null_heads_and_head_dim() -> None:
    content = {"model_type": "llama", **SIZES, "num_key_value_heads": None, "head_dim": None}
    read = architecture_from(content, "model")
    assert (read.kv_groups, read.head_dim) == (6, 8)


@pytest.mark.parametrize("theta", [10000.0, 500000, 1234567.8])
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
def test_frequencies_are_those_of_transformers(theta: float, head_dim: int) -> None:
    """Bit for bit, for every scaling that is supported."""
    scalings: list[dict[str, Any]] = [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "linear", "factor": 8},
        {**LLAMA3, "original_max_position_embeddings": 8192},
        {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 700},
        {**LLAMA3, "low_freq_factor": 1.3, "high_freq_factor": 5.7},
    ]
    for scaling in scalings:
        config = CONFIG_CLASSES["llama"](head_dim=head_dim, rope_parameters={**scaling, "rope_theta": theta})
        reference, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
        read = architecture_from(config.to_dict(), "model")
        assert factor == 1.0
        assert torch.equal(inverse_frequencies(read.rope, read.head_dim), reference)
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    assert torch.equal(inverse_frequencies(Rope(float(theta)), head_dim), plain)
