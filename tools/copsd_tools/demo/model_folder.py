"""The model that the demonstration begins with: a configuration without weights, and a tokenizer of its words."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from copsd_tools.demo.problems import WordProblem
from megatron_copsd.config.schema import PromptSettings
from megatron_copsd.data.prompts import PromptBuilder
from megatron_copsd.types import Problem


def write_model(folder: Path, problems: Iterable[WordProblem]) -> int:
    """Write a Qwen3 configuration of 1.6 M parameters and a word tokenizer; returns the vocabulary's size.

    Words keep the space before them and digits stand alone, so that decoding gives back the exact text and numbers are
    read as digits rather than memorised as words.
    """
    split = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}|\n| ?[^\s\p{L}\p{N}]+"), "isolated")
    special = ("<pad>", "<eos>", "<unk>")

    def tokenizer_of(words: Iterable[str]) -> PreTrainedTokenizerFast:
        vocabulary = {word: i for i, word in enumerate((*special, *words))}
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        core.pre_tokenizer = split
        core.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
            clean_up_tokenization_spaces=False,
        )  # fmt: skip

    builder = PromptBuilder(tokenizer_of(()), PromptSettings(template="plain"))
    texts: set[str] = set()
    for problem, language in itertools.product(problems, ("EN", "SWA")):
        statement = problem.english if language == "EN" else problem.swahili
        full = Problem("demo", language, statement, problem.english, problem.solution, str(problem.answer))
        texts.update(word for text in builder.texts(full) for word, _ in split.pre_tokenize_str(text))
    texts.update(f"{space}{digit}" for space in ("", " ") for digit in range(10))
    tokenizer = tokenizer_of(sorted(texts))
    tokenizer.save_pretrained(folder)
    Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    ).save_pretrained(folder)
    return len(tokenizer)
