"""What a key of config.json can be to the trainer, and the keys that mean the same in every family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# How a size that is not written follows from others.
Derived = Literal["num_attention_heads", "hidden_size / num_attention_heads"]
HEADS: Derived = "num_attention_heads"
HIDDEN_OVER_HEADS: Derived = "hidden_size / num_attention_heads"


@dataclass(frozen=True)
class Used:
    """A key whose value the architecture takes.

    Attributes:
        field: of ``Architecture``.
        absent: what transformers' configuration class takes where the key is not written; its type is the key's, and
            a derived size is a whole number.
        null: what an explicit null stands for; None: it is refused, as by transformers.
        spellings: further names of the key, of other versions of transformers.
    """

    field: str
    absent: bool | int | float | Derived
    null: Derived | None = None
    spellings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Only:
    """A key whose other values make another model than the trainer builds.

    Attributes:
        allowed: values that are accepted; an absent key has the first.
        rule: why others are refused.
        each: whether the value is a list (or null), of which each item must be allowed.
        remedy: what to do about others; by default, to give another model.
    """

    allowed: tuple[object, ...]
    rule: str
    each: bool = False
    remedy: str | None = None


@dataclass(frozen=True)
class Rotary:
    """A key that says part of the rotary positions; ``hf.read`` reads them together."""


@dataclass(frozen=True)
class Irrelevant:
    """A key that changes nothing of what is trained, and why."""

    why: str


@dataclass(frozen=True)
class TokenId:
    """A key that names a token, or null; it must be one that the embedding has a row for.

    Attributes:
        why: what it is to the trainer.
        several: whether a list is taken too.
        lowest: the smallest number that is taken.
    """

    why: str
    several: bool = False
    lowest: int = 0


Key = Used | Only | Rotary | Irrelevant | TokenId


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of config.json.

    Attributes:
        name: the model_type.
        keys: what each key means.
        qkv_bias, qk_norm: of ``Architecture``; no key says them.
        rope_theta: base of the rotary positions where no key says it.
        whole_heads: whether hidden_size must be a multiple of the heads even where head_dim is written.
    """

    name: str
    keys: Mapping[str, Key]
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_theta: float = 10000.0
    whole_heads: bool = False


# Kept apart from the rest, because what samples must not see it: transformers takes these keys from either file.
GENERATION = (
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind",
    "bad_words_ids", "begin_suppress_tokens", "cache_config", "cache_implementation", "compile_config", "constraints",
    "continuous_batching_config", "decoder_start_token_id", "disable_compile", "diversity_penalty", "do_sample",
    "dola_layers", "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff",
    "eta_cutoff", "exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id", "forced_eos_token_id",
    "guidance_scale", "is_assistant", "length_penalty", "low_memory", "max_cache_len", "max_length",
    "max_matching_ngram_size", "max_new_tokens", "max_time", "min_length", "min_new_tokens", "min_p",
    "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_logits", "output_scores", "penalty_alpha", "prefill_chunk_size",
    "prompt_lookup_num_tokens", "remove_invalid_values", "renormalize_logits", "repetition_penalty",
    "return_dict_in_generate", "sequence_bias", "speculation_type", "stop_strings", "suppress_tokens",
    "target_lookbehind", "temperature", "token_healing", "top_h", "top_k", "top_p", "typical_p", "use_mtp",
    "watermarking_config",
)  # fmt: skip

_QUANTISED = Only((None,), "the weights are quantised", remedy="Give the unquantised model.")
_PLAIN = "the model does something else than its family"
_SAMPLING = Irrelevant("sampling comes from the sections rollout and eval")
_WINDOW = Irrelevant("means something with use_sliding_window alone")
_KERNELS = Irrelevant("which code computes attention and experts is chosen here")
_ENCODERS = "only a decoder by itself is supported"
_RETURNED = "changes what transformers' model returns, which the embedded engine reads"
_OTHER_TASKS = Irrelevant("of heads for other tasks than the next token")
_ORIGIN = Irrelevant("tells where the file is from, or of the training that made the model")
_UNUSED = Irrelevant("of the common configuration; no supported family uses it")
NO_OUTPUT_BIAS = Only((False,), "a bias on the attention output projection is not supported")

SHARED: Mapping[str, Key] = {
    "hidden_act": Only(("silu",), "only silu (SwiGLU) is supported"),
    "mlp_bias": Only((False, None), "biases in the feed-forward layers are not supported"),
    "is_causal": Only((True,), "only causal attention is supported"),
    "use_sliding_window": Only((False, None), "sliding-window attention is not supported"),
    "layer_types": Only(("full_attention",), "sliding-window attention is not supported", each=True),
    "pretraining_tp": Only((1,), "only 1 is supported"),
    "rope_parameters": Rotary(),
    "rope_scaling": Rotary(),
    "rope_theta": Rotary(),
    "partial_rotary_factor": Rotary(),
    "original_max_position_embeddings": Rotary(),
    "rope_interleaved": Only((False, None), "rotary positions that turn neighbouring columns are not supported"),
    "use_mrope": Only((False, None), "rotary positions of several dimensions are not supported"),
    "quantization_config": _QUANTISED,
    "quantization": _QUANTISED,
    "compression_config": _QUANTISED,
    "auto_map": Only((None,), f"{_PLAIN}, and brings code for it, which is not run", remedy="Give another model."),
    "per_layer_config": Only((None, {}), "layers that differ from each other are not supported"),
    "pruned_heads": Only(({},), "heads that were taken out are not supported"),
    "is_encoder_decoder": Only((False,), _ENCODERS),
    "add_cross_attention": Only((False,), _ENCODERS),
    "cross_attention_hidden_size": Only((None,), _ENCODERS),
    "tie_encoder_decoder": Only((False,), _ENCODERS),
    "torchscript": Only((False,), _RETURNED),
    "return_dict": Only((True,), _RETURNED),
    "use_return_dict": Only((True,), _RETURNED),
    "output_attentions": Only((False, None), _RETURNED),
    "output_hidden_states": Only((False, None), _RETURNED),
    "bos_token_id": TokenId("prompts begin as the tokenizer has it", several=True),
    "eos_token_id": TokenId("a stop id, unless rollout.stop_token_ids are given", several=True),
    "pad_token_id": TokenId("padding is masked, whatever its id", lowest=-1),
    "model_type": Irrelevant("chose this table"),
    "transformers_version": Irrelevant("who wrote the file; every spelling is read"),
    "dtype": Irrelevant("model.dtype says it"),
    "torch_dtype": Irrelevant("model.dtype says it"),
    "use_bfloat16": Irrelevant("model.dtype says it"),
    "initializer_range": Irrelevant("random weights are transformers' own"),
    "attention_dropout": Irrelevant("training drops nothing out: teacher and student must differ by weights alone"),
    "use_cache": _SAMPLING,
    **dict.fromkeys(GENERATION, _SAMPLING),
    "sliding_window": _WINDOW,
    "max_window_layers": _WINDOW,
    "attn_implementation": _KERNELS,
    "_attn_implementation": _KERNELS,
    "_attn_implementation_autoset": _KERNELS,
    "_attn_implementation_internal": _KERNELS,
    "_flash_attn_2_enabled": _KERNELS,
    "experts_implementation": _KERNELS,
    "_experts_implementation": _KERNELS,
    "_experts_implementation_internal": _KERNELS,
    "finetuning_task": _OTHER_TASKS,
    "id2label": _OTHER_TASKS,
    "label2id": _OTHER_TASKS,
    "num_labels": _OTHER_TASKS,
    "problem_type": _OTHER_TASKS,
    "task_specific_params": _OTHER_TASKS,
    "tokenizer_class": Irrelevant("tokenizer_config.json says it"),
    "prefix": _UNUSED,
    "sep_token_id": _UNUSED,
    "is_decoder": _UNUSED,
    "tf_legacy_loss": _UNUSED,
    "chunk_size_feed_forward": _UNUSED,
    "tie_last_hidden_states": _UNUSED,
    "custom_pipelines": _UNUSED,
    "name_or_path": _ORIGIN,
    "_name_or_path": _ORIGIN,
    "_commit_hash": _ORIGIN,
    "_auto_class": _ORIGIN,
    "is_llama_config": _ORIGIN,
    "max_sequence_length": _ORIGIN,
    "neftune_noise_alpha": _ORIGIN,
    "transformers.js_config": _ORIGIN,
    "unsloth_fixed": _ORIGIN,
    "unsloth_version": _ORIGIN,
}


def classes(name: str) -> Only:
    """Of ``architectures``: the one class of transformers that is trained, which servers choose theirs by."""
    rule = "only a model for the next token is supported"
    return Only((name,), rule, each=True, remedy=f"Give a {name}.")
