"""The token ids that end a response: those set, or all that the model's files name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_copsd.config.schema import Config
from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.files import model_file, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("generation_config.json", "config.json")


def stop_ids(config: Config, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[int, ...]:
    """Return the ids that end a response: those set, or the model's own.

    Its own are those of generation_config.json, of config.json and of the tokenizer together: servers stop at the ids
    of both files whatever else they are told, and both engines must give the same responses.

    Args:
        config: settings.
        tokenizer: of the model.
        vocab_size: of the model; an id beyond can never be sampled.

    Raises:
        UserError: an id is not of the vocabulary, a file is malformed, no id is known, or SGLang could not do without
            one that is not set.
    """
    given = config.rollout.stop_token_ids
    written = _of_files(config, vocab_size)
    for token in given:
        if token >= vocab_size:
            rule = f"must be token ids from 0 to {vocab_size - 1}"
            remedy = "Correct them, or remove the setting."
            raise UserError(describe("rollout.stop_token_ids", list(given), rule, remedy))
    if given and config.rollout.engine == "sglang" and not written <= set(given):
        rule = f"SGLang also stops at the model's own ids, here {', '.join(map(str, sorted(written)))}"
        remedy = "Add them, or take them out of eos_token_id in the model's files."
        raise UserError(describe("rollout.stop_token_ids", list(given), rule, remedy))
    own = written | ({tokenizer.eos_token_id} - {None})
    if not given and not own:
        rule = "neither the settings, the model nor the tokenizer name an end-of-response token"
        raise UserError(describe("rollout.stop_token_ids", [], rule, "List the ids."))
    return tuple(sorted(given or own))


def _of_files(config: Config, vocab_size: int) -> set[int]:
    """Ids in the model's two files; either may name none."""
    found: set[int] = set()
    where = f"model.path ({config.model.path})"
    for name in _FILES:
        file = model_file(config.model.path, name, config.model.revision)
        if file is None:
            continue
        value = read_object(file, where).get("eos_token_id")
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if type(token) is not int or not 0 <= token < vocab_size:
                rule = f"must be a token id from 0 to {vocab_size - 1} or a list of them"
                remedy = "Correct the file, or copy it from the published model."
                raise UserError(describe(f"{where} {name}: eos_token_id", value, rule, remedy))
            found.add(token)
    return found
