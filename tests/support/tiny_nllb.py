"""A real model of the NLLB family, small: made and trained in the test until it translates what it was shown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import M2M100Config, M2M100ForConditionalGeneration, NllbTokenizer

_STEPS = 400


def make_nllb(folder: Path, translations: Mapping[str, str], target: str, *others: str) -> Path:
    """Write an HF folder of a model that translates some English lines into a language, given by its FLORES code.

    It has the codes of other languages, too, and was shown nothing of them.
    """
    characters = sorted(set("".join([*translations, *translations.values()])) - {" "})
    vocab = {token: number for number, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "\u2581", *characters])}
    tokenizer = NllbTokenizer(
        vocab=vocab, merges=[], extra_special_tokens=["eng_Latn", target, *others], src_lang="eng_Latn", tgt_lang=target
    )
    config = M2M100Config(
        vocab_size=len(tokenizer), d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, dropout=0.0, attention_dropout=0.0,
        activation_dropout=0.0, encoder_layerdrop=0.0, decoder_layerdrop=0.0, max_position_embeddings=256,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, max_length=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = M2M100ForConditionalGeneration(config)
    batch = tokenizer(list(translations), text_target=list(translations.values()), return_tensors="pt", padding=True)
    batch["labels"][batch["labels"] == tokenizer.pad_token_id] = -100
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
