"""What may be saved, and what a save may delete."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_copsd import platform
from megatron_copsd.errors import UserError
from megatron_copsd.records import manifest
from megatron_copsd.records.paths import RunFolder

with platform.importing_megatron():
    from megatron_copsd.model import checkpoint


@pytest.fixture
def alone() -> Iterator[None]:
    """A world of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_number_that_is_not_finite_is_named(alone: None, value: float, dtype: torch.dtype) -> None:
    state = {"model": {"a": torch.ones(3, 4)}, "optimizer": [torch.zeros(0), {"exp_avg": torch.ones(5, dtype=dtype)}]}
    checkpoint._require_finite(state, "here", "Remedy.")
    state["optimizer"][1]["exp_avg"][3] = value
    with pytest.raises(UserError, match=r"here: 'optimizer\.1\.exp_avg'.*NaN or infinity"):
        checkpoint._require_finite(state, "here", "Remedy.")


def test_a_state_that_is_not_finite_is_not_saved(alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    old = make(run, 1)
    bad = {"teacher": {"weight": torch.tensor([1.0, float("nan")])}}
    monkeypatch.setattr(checkpoint, "_sharded", lambda state, is_loading: bad)
    state = checkpoint.TrainingState(None, None, None, 2)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"step 2.*teacher\.weight"):
        checkpoint.save(run, state, origin=None, keep=1)  # type: ignore[arg-type]
    assert list(run.checkpoints.iterdir()) == [old]


def make(run: RunFolder, step: int) -> Path:
    folder = run.checkpoint_of(step)
    folder.mkdir(parents=True)
    (folder / "a.distcp").write_bytes(b"numbers")
    manifest.write(folder, manifest.entries(folder, manifest.files(folder)))
    return folder


def steps(run: RunFolder) -> list[int]:
    return [int(path.name[-8:]) for path in run.complete_checkpoints()]


def test_intact_ones_are_kept_in_place_of_damaged(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    made = {step: make(run, step) for step in range(1, 6)}
    (made[4] / "a.distcp").unlink()
    checkpoint._prune(run, made[5], keep=2, best=0)
    assert steps(run) == [3, 4, 5]
    checkpoint._prune(run, made[5], keep=1, best=0)
    assert steps(run) == [5]


def test_what_was_just_written_is_kept(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    made = {step: make(run, step) for step in range(1, 4)}
    checkpoint._prune(run, made[1], keep=1, best=0)
    assert 1 in steps(run)


def test_the_best_is_kept_besides(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    made = [run.checkpoint_of(step) for step in (1, 2, 3, 4)]
    for path in made:
        path.mkdir(parents=True)
        (path / "data").write_bytes(b"whole")
        manifest.write(path, manifest.entries(path, ["data"]))
    checkpoint._prune(run, made[3], keep=1, best=2)
    assert run.complete_checkpoints() == [made[1], made[3]]
