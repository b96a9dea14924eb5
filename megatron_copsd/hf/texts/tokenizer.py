"""A model's tokenizer, of which every token has a row in the embedding."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.files import is_folder, model_file, read_object

# Each set of files is a whole tokenizer. Without any, transformers makes an empty one of the model's type.
_WHOLE = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
_REMEDY = "Put the tokenizer's files that the model was published with into the folder."


def load_tokenizer(path: str, revision: str | None, vocab_size: int) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Args:
        path: a folder, or a hub name.
        revision: of the hub model.
        vocab_size: rows of the model's embedding; there may be more of them than tokens, but not fewer.

    Raises:
        UserError: there is none, its files are damaged, or it has a token that the embedding has no row for.
    """
    where = f"model.path ({path})"
    if is_folder(path) and not any(all(os.path.isfile(Path(path) / name) for name in files) for files in _WHOLE):
        raise UserError(describe(where, path, "the folder has no tokenizer (tokenizer.json)", _REMEDY))
    settings = model_file(path, "tokenizer_config.json", revision)
    if settings is not None:
        read_object(settings, where)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=False
        )
    except Exception as error:  # transformers and tokenizers raise of every kind, the latter bare Exception
        said = (str(error).splitlines() or [""])[0]
        rule = f"its tokenizer could not be read ({type(error).__name__}: {said})"
        raise UserError(describe(where, path, rule, _REMEDY)) from error
    _check_ids(tokenizer, where, vocab_size)
    return tokenizer


def _check_ids(tokenizer: PreTrainedTokenizerBase, where: str, vocab_size: int) -> None:
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) <= len(tokenizer.all_special_tokens):
        raise UserError(describe(where, len(vocabulary), "its tokenizer has no tokens for text", _REMEDY))
    beyond = sorted((number, token) for token, number in vocabulary.items() if not 0 <= number < vocab_size)
    if beyond:
        number, token = beyond[0]
        others = f" (and {len(beyond) - 1} more)" if beyond[1:] else ""
        rule = f"token {number}{others} of its tokenizer has no row in the embedding of {vocab_size} (vocab_size)"
        remedy = "Resize the model (resize_token_embeddings of transformers), or remove such tokens."
        raise UserError(describe(where, token, rule, remedy))
