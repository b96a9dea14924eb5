"""A run.dir that an earlier run has used: continued, or left as it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import make_model, settings, write_config

from copsd_tools.train import main
from megatron_copsd.config.load import load_config
from megatron_copsd.errors import UserError
from megatron_copsd.records import manifest
from megatron_copsd.records.origin import read_facts
from megatron_copsd.worker import is_finished


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("used") / "model")


@pytest.fixture
def used(tmp_path: Path, model: Path) -> Path:
    """A configuration over a folder with a checkpoint of step 4."""
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000004").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 4, "loss": 1.0}\n', encoding="utf-8")
    (run / "config.yaml").write_text("run: {}\n", encoding="utf-8")
    return write_config(tmp_path, settings(tmp_path, model))


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in (folder / "run").rglob("*")}


@pytest.mark.parametrize(
    ("overrides", "place", "found"),
    [
        (["checkpoint.resume=false"], "run.dir", "metrics.jsonl, config.yaml, checkpoints"),
        (["run.steps=3"], "run.steps", "has done 4 steps"),
    ],
)
def test_refused(used: Path, overrides: list[str], place: str, found: str) -> None:
    before = contents(used.parent)
    with pytest.raises(UserError) as error:
        main([str(used), *overrides])
    assert place in str(error.value)
    assert found in str(error.value)
    assert contents(used.parent) == before


def test_a_finished_run_has_nothing_to_do(used: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(used.parent)
    assert main([str(used), "run.steps=4"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert contents(used.parent) == before


def test_a_damaged_last_checkpoint_does_not_finish_a_run(used: Path) -> None:
    checkpoints = used.parent / "run" / "checkpoints"
    (checkpoints / "step_00000002").mkdir()
    last = checkpoints / "step_00000004"
    (last / "data").write_bytes(b"whole")
    manifest.write(last, manifest.entries(last, ["data"]))
    config = load_config(str(used), ["run.steps=4"]).config
    assert is_finished(config)
    (last / "data").write_bytes(b"cut")
    assert not is_finished(config)


@pytest.mark.parametrize("name", ["n" * 300, "problems.jsonl", "problems.jsonl/run", "link"])
def test_a_folder_that_can_not_be_is_told_before_anything_else(tmp_path: Path, model: Path, name: str) -> None:
    config = write_config(tmp_path, settings(tmp_path, model))
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"run\.dir: "):
        main([str(config), f"run.dir={tmp_path / name}", "--check"])
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unused_folder_may_start_anew(tmp_path: Path, model: Path) -> None:
    config = write_config(tmp_path, settings(tmp_path, model))
    assert main([str(config), "checkpoint.resume=false", "--check"]) == 0


@pytest.mark.parametrize(
    ("name", "stands"),
    [
        ("config.yaml", Path.mkdir),
        ("config.yaml", os.mkfifo),
        ("metrics.jsonl", os.mkfifo),
        ("format.json", os.mkfifo),
        ("checkpoints", Path.touch),
        ("rollouts", os.mkfifo),
        ("tensorboard", Path.touch),
    ],
)
def test_what_stands_in_the_way_is_told_before_anything_is_done(
    tmp_path: Path, model: Path, name: str, stands: Callable[[Path], object]
) -> None:
    (tmp_path / "run").mkdir()
    stands(tmp_path / "run" / name)
    config = write_config(tmp_path, settings(tmp_path, model))
    with pytest.raises(UserError, match=rf"{name}: .*something else is there\. Move it away"):
        main([str(config)])
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


def test_a_pipe_in_a_checkpoint_is_not_read(used: Path) -> None:
    checkpoint = used.parent / "run" / "checkpoints" / "step_00000004"
    os.mkfifo(checkpoint / "manifest.json")
    with pytest.raises(UserError, match=r"step_00000004.*manifest\.json can't be read"):
        main([str(used), "run.steps=4"])
    os.mkfifo(checkpoint / "trainer.json")
    with pytest.raises(UserError, match=r"trainer\.json.*can't be read"):
        read_facts(checkpoint)
