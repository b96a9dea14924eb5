"""Which settings may change when a run is continued."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import make_model, settings, write_config

from megatron_copsd.config.load import load_config
from megatron_copsd.config.resume import REFUSED, WITHOUT_EFFECT, changes
from megatron_copsd.config.schema import Config

DOCS = (Path(__file__).parents[2] / "docs" / "runs.md").read_text(encoding="utf-8")


def names() -> Iterator[str]:
    for section, field in Config.model_fields.items():
        yield section
        assert field.annotation
        yield from (f"{section}.{name}" for name in field.annotation.model_fields)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    return write_config(folder, settings(folder, make_model(folder / "model")))


@pytest.mark.parametrize("setting", [*REFUSED, *WITHOUT_EFFECT])
def test_the_tables_name_settings(setting: str) -> None:
    assert setting in set(names())
    assert f"`{setting}" in DOCS


@pytest.mark.parametrize(
    ("override", "setting", "refused"),
    [
        ("run.seed=4", "run.seed", True),
        ("lora.rank=4", "lora.rank", True),
        ("model.dtype=bfloat16", "model.dtype", True),
        ("optimizer.lr=0.01", "optimizer.lr", False),
        ("loss.temperature=2.0", "loss.temperature", False),
        ("prompt.max_student_tokens=99", "prompt.max_student_tokens", False),
    ],
)
def test_what_differs_is_found(config: Path, override: str, setting: str, refused: bool) -> None:
    before = load_config(config).config.model_dump(mode="json")
    (change,) = changes(before, load_config(config, [override]).config)
    assert change.setting == setting
    assert change.before != change.after
    assert (change.refused is not None) == refused


@pytest.mark.parametrize("override", ["run.steps=9", "parallel.tensor=2", "sglang.attempts=7", "checkpoint.keep=9"])
def test_what_changes_no_number_is_not_said(config: Path, override: str) -> None:
    before = load_config(config).config.model_dump(mode="json")
    assert changes(before, load_config(config, [override]).config) == []


def test_a_setting_that_was_not_recorded_is_not_compared(config: Path) -> None:
    now = load_config(config).config
    before = now.model_dump(mode="json")
    del before["loss"]
    del before["optimizer"]["lr"]
    assert changes(before, now) == []
