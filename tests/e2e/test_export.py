"""Exports of a real run: the folder appears complete or not at all, and what it was made from is never touched."""

from __future__ import annotations

from pathlib import Path

from processes import Command, copsd_each, train
from tiny import make_model, settings, write_config


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_exports(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    run, out = tmp_path / "run", tmp_path / "out"
    train(write_config(tmp_path, settings(tmp_path, model)), "run.steps=1")
    trained = contents(run)
    export = ("export", run, "--out", out)

    first, own, killed = copsd_each(
        [
            Command(export),
            Command(("export", run, "--out", run, "--force")),
            Command((*export, "--force"), killed_at=tmp_path / "out.partial" / "config.json"),
        ],
        tmp_path / "said",
    )
    assert first.returncode == 0, first.stderr
    made = contents(out)
    assert own.returncode == 2
    assert "is or contains the run" in own.stderr
    assert killed.returncode < 0, killed.stdout + killed.stderr
    assert (tmp_path / "out.partial").is_dir()
    assert contents(out) == made

    refused, again = copsd_each([Command(export), Command((*export, "--force"))], tmp_path / "said again")
    assert refused.returncode == 2
    assert "exists already" in refused.stderr
    assert again.returncode == 0, again.stderr
    assert contents(out) == made
    assert not (tmp_path / "out.partial").exists()
    assert contents(run) == trained
