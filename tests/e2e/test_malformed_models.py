"""A model folder that is wrong: every command that takes one refuses it with the same words, and writes nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from layouts import selected
from processes import Command, copsd_each
from safetensors.torch import load_file, save_file
from tiny import make_model, settings, write_config

COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "check": (("train",), ("--check",)),
    "train": (("train",), ()),
    "evaluate": (("evaluate", "accuracy"), ()),
    "serve": (("serve",), ()),
    "plan": (("plan",), ("--gpus", "1")),
}
# Of the configuration, the weights' headers, the texts, the weights themselves: who looks at them.
CONFIGURATION = ("check", "train", "evaluate", "serve", "plan")
HEADERS = ("check", "train", "evaluate", "serve")
TEXTS = ("check", "train", "evaluate")
VALUES = ("train", "evaluate")


@dataclass(frozen=True)
class Fault:
    """How the folder is broken, which commands see it, and what each must name."""

    name: str
    seen_by: tuple[str, ...]
    names: tuple[str, ...]
    spoil: Callable[[Path], object]
    overrides: tuple[str, ...] = ()


def edit(name: str, **changes: object) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        content = json.loads((model / name).read_text(encoding="utf-8"))
        (model / name).write_text(json.dumps({**content, **changes}), encoding="utf-8")

    return spoil


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda model: (model / name).write_text(text, encoding="utf-8") and None


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        found = load_file(model / "model.safetensors")
        change(found)
        save_file(found, model / "model.safetensors")

    return spoil


EMBEDDING, OUTPUT, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
FAULTS = [
    Fault("unknown key", CONFIGURATION, ("config.json: is_cusal", "False", "Did you mean 'is_causal'"),
          edit("config.json", is_cusal=False)),
    Fault("wrong type", ("check",), ("config.json: rms_norm_eps", "'small'", "above 0"),
          edit("config.json", rms_norm_eps="small")),
    Fault("adapter", ("check", "evaluate"), ("'adapter_config.json'", "Merge it"), write("adapter_config.json", "{}")),
    Fault("no JSON", ("check", "plan"), ("config.json could not be read", "Download"), write("config.json", "{")),
    Fault("missing folder", CONFIGURATION, ("model.path", "'./modle'", "is no folder here", "Correct the path"),
          lambda model: None, ("model.path=./modle",)),
    Fault("missing tensor", HEADERS, (f"'{NORM}'", "there is none of that name"), tensors(lambda t: t.pop(NORM))),
    Fault("extra tensor", ("check", "evaluate"), ("'score.weight'", "has no parameter for"),
          tensors(lambda t: t.update({"score.weight": torch.ones(2)}))),
    Fault("misshapen tensor", ("check", "evaluate"), (f"'{NORM}'", "has shape [3]", "by config.json it is [32]"),
          tensors(lambda t: t.update({NORM: torch.ones(3)}))),
    Fault("broken index", ("check", "evaluate"), ("model.safetensors.index.json", "not an object, but list"),
          write("model.safetensors.index.json", "[]")),
    Fault("tied output that differs", VALUES, (f"'{OUTPUT}'", "ties the output weight", "tie_word_embeddings"),
          tensors(lambda t: t.update({OUTPUT: t[EMBEDDING] + 1}))),
    Fault("NaN", VALUES, (f"'{NORM}'", "holds NaN"), tensors(lambda t: t[NORM].fill_(torch.nan))),
    Fault("tokenizer settings", ("check",), ("tokenizer_config.json", "not an object"),
          write("tokenizer_config.json", "[]")),
    Fault("longer tokenizer", TEXTS, ("'<finish>'", "no row in the embedding", "Resize"),
          edit("tokenizer_config.json", eos_token="<finish>")),
    Fault("generation config", ("check",), ("generation_config.json", "not JSON"),
          write("generation_config.json", "{")),
    Fault("stop id", ("check", "evaluate"), ("rollout.stop_token_ids", "[99999]", "token ids from 0 to"),
          lambda model: None, ("rollout.stop_token_ids=[99999]",)),
    Fault("template", ("check",), ("prompt.template", "leaves the user's message out"),
          write("chat_template.jinja", "hello"),
          ("prompt.template=chat",)),
    Fault("transformers' own type", ("check",), ("transformers could not read its config.json", "use_cache"),
          edit("config.json", use_cache="yes")),
]  # fmt: skip


@pytest.fixture(scope="module")
def answers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], subprocess.CompletedProcess[str]]:
    """What each command says to each fault."""
    folder = tmp_path_factory.mktemp("faults")
    good = make_model(folder / "good")
    commands = {}
    for number, fault in enumerate(selected(request)):
        own = folder / str(number)
        shutil.copytree(good, own / "model")
        fault.spoil(own / "model")
        source = {"path": str(own / "problems.jsonl"), "layout": "released", "language": "SWA"}
        config = write_config(own, settings(own, own / "model", data={"eval": [source]}))
        for name in fault.seen_by:
            before, options = COMMANDS[name]
            commands[fault.name, name] = Command((*before, config, *fault.overrides, *options))
    return dict(zip(commands, copsd_each([*commands.values()], folder / "said"), strict=True))


@pytest.mark.parametrize("case", FAULTS, ids=lambda fault: fault.name)
def test_every_command_says_the_same(
    answers: dict[tuple[str, str], subprocess.CompletedProcess[str]], case: Fault
) -> None:
    for command in case.seen_by:
        done = answers[case.name, command]
        assert done.returncode == 2, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr + done.stdout, f"{command}: {done.stderr}"
        for name in case.names:
            assert name in done.stderr, f"{command}: {name!r} is not in:\n{done.stderr}"
        config = next(Path(str(part)) for part in done.args if str(part).endswith("config.yaml"))
        assert not (config.parent / "run" / "config.yaml").exists(), command
