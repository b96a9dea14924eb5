"""What a checkpoint is worth: damage is found and named, nothing in it runs, models that are not finite are refused."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Command, copsd_each, metrics, train
from safetensors.torch import load_file, save_file
from tiny import make_model, settings, write_config

FIRST, SECOND = "step_00000001", "step_00000002"
DANGER = "tests_danger"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Path]:
    """A folder, its configuration, and a run with checkpoints of two steps."""
    folder = tmp_path_factory.mktemp("trust")
    sections = {
        "run": {"steps": 2},
        "checkpoint": {"save_every": 1},
        "rollout": {"prompts_per_step": 2, "max_response_tokens": 4},
    }
    tree = settings(folder, make_model(folder / "model"), **sections)
    train(write_config(folder, tree))
    return folder, tree, folder / "run"


class Opens:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        """Take the file's path."""
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        """Return what pickle shall call."""
        return open, (str(self.path), "w")


def checkpoint(run: Path, name: str) -> Path:
    return run / "checkpoints" / name


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def data(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


def spoil_flip(folder: Path) -> str:
    flip(data(folder))
    return f"{data(folder).name} has other content"


def spoil_truncate(folder: Path) -> str:
    path = data(folder)
    path.write_bytes(path.read_bytes()[:-1])
    return "bytes instead of"


def spoil_remove(folder: Path) -> str:
    (folder / ".metadata").unlink()
    return ".metadata is missing"


def spoil_add(folder: Path) -> str:
    (folder / "extra.pt").write_bytes(b"1")
    return "extra.pt is not in manifest.json"


def spoil_manifest(folder: Path) -> str:
    (folder / "manifest.json").write_text("{", encoding="utf-8")
    return "manifest.json can't be read"


def spoil_no_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "manifest.json can't be read"


SPOILS = (spoil_flip, spoil_truncate, spoil_remove, spoil_add, spoil_manifest, spoil_no_manifest)


def said(done: Any) -> str:
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return " ".join((done.stdout + done.stderr).split())


def test_damaged_ones_are_named_and_passed_over(good: tuple[Path, dict[str, Any], Path], tmp_path: Path) -> None:
    _, tree, whole = good
    config = write_config(tmp_path, tree)
    expected = [line["loss"] for line in metrics(whole)]
    commands, texts = [], []
    for number, spoil in enumerate(SPOILS):
        run = tmp_path / str(number)
        shutil.copytree(whole, run)
        texts.append(spoil(checkpoint(run, SECOND)))
        commands += [
            Command(("export", run, "--step", 2, "--out", tmp_path / f"step{number}")),
            Command(("export", run, "--out", tmp_path / f"out{number}")),
        ]
        # One of the kinds says enough of what follows from there.
        if number == 0:
            commands.append(Command(("train", config, f"run.dir={run}")))
    both = tmp_path / "both"
    shutil.copytree(whole, both)
    for name in (FIRST, SECOND):
        flip(data(checkpoint(both, name)))
    commands += [Command(("train", config, f"run.dir={both}")), Command(("export", both, "--out", tmp_path / "none"))]
    before = (both / "metrics.jsonl").read_bytes()
    done = {tuple(map(str, each.args)): each for each in copsd_each(commands, tmp_path / "said")}
    for number, text in enumerate(texts):
        run = tmp_path / str(number)
        one = done["export", str(run), "--step", "2", "--out", str(tmp_path / f"step{number}")]
        assert (one.returncode, (tmp_path / f"step{number}").exists()) == (2, False)
        assert text in said(one)
        newest = done["export", str(run), "--out", str(tmp_path / f"out{number}")]
        assert newest.returncode == 0, newest.stderr
        assert text in said(newest)
        assert FIRST in newest.stdout.splitlines()[-1]
    resumed = done["train", str(config), f"run.dir={tmp_path / '0'}"]
    assert resumed.returncode == 0, resumed.stderr
    assert texts[0] in said(resumed)
    assert "1 steps done" in said(resumed)
    assert [line["loss"] for line in metrics(tmp_path / "0")] == expected
    for arguments in (
        ("train", str(config), f"run.dir={both}"),
        ("export", str(both), "--out", str(tmp_path / "none")),
    ):
        assert done[arguments].returncode == 2
        for text in (FIRST, SECOND, "has other content", "no intact checkpoint is left"):
            assert text in said(done[arguments])
    assert (both / "metrics.jsonl").read_bytes() == before


def hostile_metadata(folder: Path, mark: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Opens(mark)))


def hostile_field_of_metadata(folder: Path, mark: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = [metadata.planner_data, Opens(mark)]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def hostile_module_path(folder: Path, mark: Path) -> None:
    # A name with dots reaches from an allowed module to any that it imports.
    text, command = b"torch.serialization", f"touch {mark}".encode()
    names = b"\x8c" + bytes([len(text)]) + text + b"\x8c\x09os.system\x93"
    (folder / ".metadata").write_bytes(
        b"\x80\x04" + names + b"X" + len(command).to_bytes(4, "little") + command + b"\x85R."
    )


def hostile_common(folder: Path, mark: Path) -> None:
    # Megatron 0.19 writes none, and reads one that it finds.
    torch.save({"scheduler": Opens(mark)}, folder / "common.pt")


def hostile_bytes(folder: Path, mark: Path) -> None:
    """Every small object that a data file holds becomes the hostile one."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    buffer = io.BytesIO()
    torch.save([Opens(mark)], buffer)
    described = metadata.state_dict_metadata
    entries = [
        (index, info)
        for index, info in metadata.storage_data.items()
        if type(described[index.fqn]).__name__ == "BytesStorageMetadata"
    ]
    assert entries
    file = folder / entries[0][1].relative_path
    offset = file.stat().st_size
    file.write_bytes(file.read_bytes() + buffer.getvalue())
    for _, info in entries:
        info.relative_path, info.offset, info.length = file.name, offset, len(buffer.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def foreign_format(folder: Path, mark: Path) -> None:
    tree = {"sharded_backend": "zarr", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(tree), encoding="utf-8")


@dataclass(frozen=True)
class Hostile:
    """A way to write a checkpoint that does something when it is read, and what is said of it."""

    write: Callable[[Path, Path], None]
    names: tuple[str, ...]


HOSTILE = (
    Hostile(hostile_metadata, (".metadata", "open", "Nothing of it was run")),
    Hostile(hostile_field_of_metadata, (".metadata", "open", "Nothing of it was run")),
    Hostile(hostile_module_path, (".metadata", "torch.serialization.os.system")),
    Hostile(hostile_common, ("common.pt", "open", "Nothing of it was run")),
    Hostile(hostile_bytes, (".distcp", "open", "Nothing of it was run")),
    Hostile(foreign_format, ("metadata.json", "zarr", "torch_dist")),
)


def test_nothing_in_a_checkpoint_runs(good: tuple[Path, dict[str, Any], Path], tmp_path: Path) -> None:
    _, tree, whole = good
    config = write_config(tmp_path, tree)
    commands = []
    for number, hostile in enumerate(HOSTILE):
        run = tmp_path / f"run{number}"
        shutil.copytree(whole, run)
        shutil.rmtree(checkpoint(run, FIRST))
        folder = checkpoint(run, SECOND)
        # As one who means harm would: without a manifest, as checkpoints of before there were any.
        (folder / "manifest.json").unlink()
        (folder / "trainer.json").write_text('{"step": 2}', encoding="utf-8")
        hostile.write(folder, tmp_path / f"mark{number}")
        commands += [
            Command(("train", config, f"run.dir={run}", "run.steps=3")),
            Command(("export", run, "--out", tmp_path / f"out{number}")),
        ]
    done = copsd_each(commands, tmp_path / "said")
    for number, hostile in enumerate(HOSTILE):
        assert not (tmp_path / f"mark{number}").exists(), hostile.write.__name__
        assert not (tmp_path / f"out{number}").exists()
        for one in done[2 * number : 2 * number + 2]:
            assert one.returncode == 2, (hostile.write.__name__, one.stdout + one.stderr)
            for name in hostile.names:
                assert name in said(one), (hostile.write.__name__, one.stderr)


def test_a_model_that_is_not_finite_is_refused_by_name(good: tuple[Path, dict[str, Any], Path], tmp_path: Path) -> None:
    folder, tree, _ = good
    shutil.copytree(folder / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    config = write_config(tmp_path, tree)
    (done,) = copsd_each(
        [Command(("train", config, f"model.path={tmp_path / 'model'}", f"run.dir={tmp_path / 'run'}"))], tmp_path / "s"
    )
    assert done.returncode == 2
    assert name in said(done)
    assert not (tmp_path / "run").exists()
