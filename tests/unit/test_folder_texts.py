"""Tokenizer, chat template and stop ids of a model folder: taken from its files, or refused before weights are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_tokenizer import CHAT_TEMPLATE, small_tokenizer
from tiny import settings, write_config

from megatron_copsd.config.load import load_config
from megatron_copsd.config.schema import Config, PromptSettings
from megatron_copsd.data.items import check_texts, load_held_out, load_items
from megatron_copsd.data.prompts import PromptBuilder
from megatron_copsd.errors import UserError
from megatron_copsd.hf.read import read_architecture
from megatron_copsd.hf.texts.chat import ChatTemplate
from megatron_copsd.hf.texts.stops import stop_ids
from megatron_copsd.hf.texts.tokenizer import load_tokenizer
from megatron_copsd.types import Problem

SIZE = len(small_tokenizer())
PROBLEM = Problem("sw.tsv:3", "SWA", "Mbili na mbili?", "Two and two?", "2 + 2 = 4", "4")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder without weights, which nothing here reads."""
    folder = tmp_path / "model"
    small_tokenizer().save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    write(folder, "config.json", {"model_type": "llama", "vocab_size": SIZE, "max_position_embeddings": 512, **sizes})
    edit(folder, "config.json", eos_token_id=None, bos_token_id=None)
    return folder


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def edit(folder: Path, name: str, **changes: object) -> None:
    write(folder, name, {**json.loads((folder / name).read_text(encoding="utf-8")), **changes})


def configured(model: Path, *overrides: str, **sections: dict[str, Any]) -> Config:
    tree = settings(model.parent, model, **sections)
    return load_config(str(write_config(model.parent, tree)), list(overrides)).config


def checked(config: Config) -> None:
    check_texts(config, read_architecture(config.model.path))


def refused(call: Callable[[], object], *names: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    for name in names:
        assert name in str(error.value), f"{name!r} is not in {error.value}"


# Tokenizers.


def add_tokens(folder: Path) -> None:
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(folder)


def own_end(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", eos_token="<finish>")


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), ("no tokenizer (tokenizer.json)", "published with")),
        (lambda f: write(f, "tokenizer.json", "{"), ("tokenizer could not be read", "published with")),
        (lambda f: write(f, "tokenizer.json", []), ("tokenizer could not be read",)),
        (lambda f: write(f, "tokenizer.json", {"model": {"type": "none"}}), ("tokenizer could not be read",)),
        (lambda f: write(f, "tokenizer_config.json", []), ("tokenizer_config.json", "not an object, but list")),
        (lambda f: write(f, "tokenizer_config.json", "no"), ("tokenizer_config.json", "not JSON")),
        (lambda f: edit(f, "tokenizer_config.json", tokenizer_class=3), ("tokenizer could not be read",)),
        (lambda f: edit(f, "tokenizer_config.json", added_tokens_decoder=[1]), ("tokenizer could not be read",)),
        (add_tokens, ("'<one>'", f"token {SIZE} (and 1 more)", f"embedding of {SIZE}", "Resize the model")),
        (own_end, ("'<finish>'", f"token {SIZE} of its tokenizer", "Resize the model")),
        (lambda f: edit(f, "config.json", vocab_size=40), ("token 40 (and", "embedding of 40")),
    ],
)  # fmt: skip
def test_tokenizers_that_are_refused(model: Path, spoil: Callable[[Path], None], names: tuple[str, ...]) -> None:
    spoil(model)
    refused(lambda: checked(configured(model)), "model.path", *names)


def test_a_tokenizer_may_be_shorter_than_the_embedding(model: Path) -> None:
    edit(model, "config.json", vocab_size=SIZE + 100)
    checked(configured(model))
    assert len(load_tokenizer(str(model), None, SIZE + 100)) == SIZE


# Stop ids.


def stops(config: Config) -> tuple[int, ...]:
    return stop_ids(config, small_tokenizer(), SIZE)


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        (None, None, (1,)),
        ([1, 3, 5], None, (1, 3, 5)),
        (7, None, (1, 7)),
        (None, {"eos_token_id": [4, 2]}, (1, 2, 4)),
        (6, {"eos_token_id": 9}, (1, 6, 9)),
        (6, {}, (1, 6)),
        (None, {"eos_token_id": None}, (1,)),
    ],
)
def test_stop_ids_are_all_that_the_files_name(
    model: Path, in_config: object, in_generation: object, expected: tuple[int, ...]
) -> None:
    edit(model, "config.json", eos_token_id=in_config)
    if in_generation is not None:
        write(model, "generation_config.json", in_generation)
    assert stops(configured(model)) == expected
    assert stops(configured(model, "rollout.stop_token_ids=[11,10]")) == (10, 11)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("{", ("generation_config.json could not be read", "not JSON")),
        ("", ("generation_config.json could not be read",)),
        ("[]", ("generation_config.json could not be read", "not an object")),
        ('{"eos_token_id": 1, "eos_token_id": 2}', ("'eos_token_id' stands there twice",)),
        ({"eos_token_id": "1"}, ("generation_config.json: eos_token_id", "'1'", "must be a token id")),
        ({"eos_token_id": [1, True]}, ("eos_token_id", "[1, True]")),
        ({"eos_token_id": [[1]]}, ("eos_token_id", "[[1]]")),
        ({"eos_token_id": 1.0}, ("eos_token_id", "1.0")),
        ({"eos_token_id": [1, SIZE]}, ("eos_token_id", f"to {SIZE - 1}", "Correct the file")),
        ({"eos_token_id": -1}, ("eos_token_id", "-1")),
    ],
)
def test_malformed_stop_ids_are_errors(model: Path, content: object, names: tuple[str, ...]) -> None:
    write(model, "generation_config.json", content)
    refused(lambda: checked(configured(model)), *names)


def test_stop_ids_that_are_set(model: Path) -> None:
    config = configured(model, "rollout.stop_token_ids=[1,99999]")
    refused(lambda: checked(config), "rollout.stop_token_ids", "[1, 99999]", f"from 0 to {SIZE - 1}", "remove")
    edit(model, "config.json", eos_token_id=[1, 3])
    servers = ("rollout.engine=sglang", "sglang.urls=[http://127.0.0.1:1]")
    refused(lambda: stops(configured(model, "rollout.stop_token_ids=[3]", *servers)), "SGLang also stops", "1, 3")
    assert stops(configured(model, "rollout.stop_token_ids=[3,1,4]", *servers)) == (1, 3, 4)


# Chat templates.

DATED = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
DATED += "Today is {{ date_string }}.\n" + CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("{% for %}", ("fails in line 1", "TemplateSyntaxError", "chat_template.jinja")),
        ("{{ messages[0].content }} {{ nothing.at.all }}", ("fails", "UndefinedError")),
        ("{{ raise_exception('only for tools') }}", ("fails", "only for tools")),
        ("{% for i in range(10**9) %}{% endfor %}", ("fails",)),
        ("<|user|>\n", ("leaves the user's message out",)),
        ("{{ messages[0].content[:60] }}", ("leaves the user's message out, or changes it",)),
        ("{{ messages[0].content | upper }}", ("leaves the user's message out, or changes it",)),
        ("{{ ['a', 'b'] | random }}" + CHAT_TEMPLATE, ("by chance",)),
        ("{{ strftime_now('%Y') }}" + CHAT_TEMPLATE, ("today's date", "Write a fixed date")),
        (DATED, ("today's date", "Set prompt.date")),
    ],
)
def test_chat_templates_that_are_refused(model: Path, template: str, names: tuple[str, ...]) -> None:
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    refused(lambda: checked(configured(model, "prompt.template=chat")), "prompt.template: 'chat'", *names)
    checked(configured(model))  # which does not use it


def test_a_date_that_is_set_is_the_one_shown() -> None:
    tokenizer = small_tokenizer(chat_template=DATED)
    student, teacher = PromptBuilder(tokenizer, PromptSettings(date="26 Jul 2024")).texts(PROBLEM)
    assert student.startswith("Today is 26 Jul 2024.\n<s><|user|>")
    assert teacher.startswith("Today is 26 Jul 2024.\n")


def test_a_date_that_nothing_shows_is_refused() -> None:
    refused(lambda: ChatTemplate(small_tokenizer(), "26 Jul 2024"), "prompt.date", "no date_string", "Remove it")


@pytest.mark.parametrize("template", [{"default": CHAT_TEMPLATE, "tool_use": "x"}, CHAT_TEMPLATE])
def test_a_template_by_name(template: str | dict[str, str]) -> None:
    assert "mbili?" in ChatTemplate(small_tokenizer(chat_template=template), None).prompt("mbili?")
    refused(lambda: ChatTemplate(small_tokenizer(chat_template={"tool_use": "x"}), None), "no chat template")


def test_values_that_transformers_refuses(model: Path) -> None:
    """Of keys that nothing here reads, but every part of a run that is transformers' does."""
    for key, value in (("use_cache", "yes"), ("dtype", "bogus"), ("attention_dropout", [0]), ("id2label", 5)):
        edit(model, "config.json", **{key: value})
        refused(lambda: checked(configured(model)), "transformers could not read its config.json", "Compare the file")
        edit(model, "config.json", **{key: None})


# Positions.


def positions(model: Path, limit: int) -> None:
    edit(model, "config.json", max_position_embeddings=limit)


def longest(config: Config, view: str) -> int:
    (units,) = load_items(config, small_tokenizer(), show=False).train
    return max(
        len(getattr(pair, f"{view}_prompt")) + (len(response.response) if response else 0)
        for unit in units
        for pair, response in unit
    )


@pytest.mark.parametrize(
    ("objective", "view", "overrides", "names"),
    [
        ("copsd", "teacher", (), ("12 (rollout.max_response_tokens)", "max_teacher_tokens to")),
        (
            "grpo",
            "student",
            ("rollout.samples_per_prompt=2",),
            ("12 (rollout.max_response_tokens)", "max_student_tokens to"),
        ),
        ("sft", "student", ("rollout.max_response_tokens=300",), ("(tokens of the solution)", "max_student_tokens to")),
        (
            "sft",
            "teacher",
            ("rollout.max_response_tokens=300", "data.train.0.view=teacher"),
            ("(tokens of the solution)",),
        ),
    ],
)
def test_sequences_are_held_to_the_models_positions(
    model: Path, objective: str, view: str, overrides: tuple[str, ...], names: tuple[str, ...]
) -> None:
    config = configured(model, f"objective.name={objective}", *overrides)
    needed = longest(config, view if objective != "sft" else "student") + (0 if objective == "sft" else 12)
    positions(model, needed)
    load_items(config, small_tokenizer(), show=False)
    positions(model, needed - 1)
    refused(
        lambda: load_items(config, small_tokenizer(), show=False),
        "problems.jsonl:", " tokens", f"exceeds the model's {needed - 1} positions", *names,
    )  # fmt: skip


def test_servers_keep_positions_for_themselves(model: Path) -> None:
    config = configured(model, "rollout.engine=sglang", "sglang.urls=[http://127.0.0.1:1]", "teacher.weights=live")
    held_out = config.model_copy(update={"data": config.data.model_copy(update={"eval": config.data.train})})
    needed = longest(config, "student") + 12 + 2
    positions(model, needed)
    load_held_out(held_out, small_tokenizer(), show=False)
    positions(model, needed - 1)
    refused(lambda: load_held_out(held_out, small_tokenizer(), show=False), "less the 2 that SGLang keeps")


def test_a_response_that_fills_the_model_needs_no_data_to_be_refused(model: Path) -> None:
    config = configured(model, "rollout.max_response_tokens=512")
    refused(lambda: checked(config), "rollout.max_response_tokens: 512", "512 positions", "below 512")
