"""Where exports go: only an export is replaced, nothing incomplete has its name, and all is known before the work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import make_model, settings, write_config

from copsd_tools.cli import main
from megatron_copsd.errors import UserError
from megatron_copsd.hf import outputs
from megatron_copsd.hf.folder import write_folder

TENSORS = {"a": torch.ones(2, 2)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("made") / "model")


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    """What looks like a run, beside its model; its checkpoint is never opened here."""
    shutil.copytree(model, tmp_path / "model")
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step_00000001").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    write_config(folder, settings(tmp_path, tmp_path / "model"))
    return folder


def tree(folder: Path) -> dict[str, object]:
    """Every path below a folder, with the content of files and the target of links."""
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def made(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x", encoding="utf-8")
    return folder


def link(name: str, target: str) -> Callable[[Path], Path]:
    def make(base: Path) -> Path:
        (base / name).symlink_to(base / target)
        return base / name

    return make


def beside(*folders: str) -> Callable[[Path], Path]:
    def make(base: Path) -> Path:
        for folder in folders:
            made(base / folder, "thesis.tex")
        return base / "out"

    return make


def linked_parent(base: Path) -> Path:
    return link("elsewhere", "run")(base) / "checkpoints"


def stale_mark(base: Path) -> Path:
    """Complete, with the mark of a swap that was not quite finished, and somebody's folder under the other name."""
    made(base / "out", "config.json", "model.safetensors")
    (base / "out" / ".copsd-export").write_text("complete\n", encoding="utf-8")
    made(base / "out.old", "thesis.tex")
    return base / "out"


MODEL = ("config.json", "model.safetensors")
REFUSED = {
    "the run": (lambda b: b / "run", "is or contains the run"),
    "its parent": (lambda b: b, "is or contains the run"),
    "its checkpoints": (lambda b: b / "run" / "checkpoints", "lies in the run"),
    "among its checkpoints": (lambda b: b / "run" / "checkpoints" / "step_00000009", "lies in the run's checkpoints"),
    "an export in the run": (lambda b: made(b / "run" / "hf", *MODEL), "lies in the run"),
    "the run by dots": (lambda b: b / "model" / ".." / "run", "is or contains the run"),
    "a link to the run": (link("link", "run"), "is a symbolic link"),
    "a dangling link": (link("link", "gone"), "is a symbolic link"),
    "below a link to the run": (linked_parent, "lies in the run"),
    "the model": (lambda b: b / "model", "is or contains the model that was trained"),
    "inside the model": (lambda b: b / "model" / "new", "lies in the model"),
    "another run": (lambda b: made(b / "o", "metrics.jsonl", "config.yaml"), "config.yaml in it belongs to no export"),
    "a folder below": (lambda b: made(b / "o", *MODEL, "checkpoint-10/x"), "checkpoint-10 in it is no file"),
    "optimizer state": (lambda b: made(b / "o", *MODEL, "optimizer.pt"), "optimizer.pt in it"),
    "no weights": (lambda b: made(b / "o", "config.json"), "it has no weights"),
    "weights alone": (lambda b: made(b / "o", "model.safetensors"), "neither config.json"),
    "a file": (lambda b: b / "problems.jsonl", "is a file"),
    "below a file": (lambda b: b / "problems.jsonl" / "deep" / "out", "problems.jsonl is no folder"),
    "a long name": (lambda b: b / ("x" * 250), "the name is too long"),
    "a long new parent": (lambda b: b / ("x" * 300) / "out", "at most"),
    "a long path": (lambda b: b.joinpath(*["x" * 200] * 40), "the path is too long"),
    "the root": (lambda b: Path("/"), "root of the file system"),
    "a foreign partial": (beside("out.partial"), "out.partial"),
    "a foreign old": (beside("out.old"), "out.old"),
    "a foreign old of a marked folder": (stale_mark, "out.old is not what it replaced"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_force_never_replaces_what_is_no_export(
    run: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place, said = REFUSED[case]
    out = place(tmp_path)
    before = tree(tmp_path)
    assert main(["export", str(run), "--out", str(out), "--force"]) == 2
    error = capsys.readouterr().err
    assert "--out" in error
    assert said in error
    assert tree(tmp_path) == before


def test_an_export_is_replaced_only_with_force(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = made(tmp_path / "out", *MODEL, "tokenizer.json", "tokenizer_config.json")
    assert main(["export", str(run), "--out", str(out)]) == 2
    assert "exists already. Choose another folder, or add --force" in capsys.readouterr().err
    for folder in (
        out,
        made(tmp_path / "adapter", "adapter_config.json", "adapter_model.safetensors"),
        made(tmp_path / "e"),
    ):
        outputs.check_output(folder, {"run": run}, True, 0)
    with pytest.raises(UserError, match="MB free"):
        outputs.check_output(out, {"run": run}, True, 10**18)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_without_permission_is_found_first(run: Path, tmp_path: Path) -> None:
    closed = made(tmp_path / "closed")
    closed.chmod(0o500)
    with pytest.raises(UserError, match="nothing can be written in"):
        outputs.check_output(closed / "deep" / "out", {"run": run}, False, 0)


class Killed(BaseException):
    """The process ends here: nothing after it is done."""


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_swap_that_was_ended_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int) -> None:
    out, done = made(tmp_path / "out", *MODEL), []

    def replace(source: Path, target: Path) -> None:
        if len(done) == renames:
            raise Killed
        done.append(os.rename(source, target))

    def rmtree(*_: object, **__: object) -> None:
        raise Killed

    def export() -> None:
        with outputs.new_folder(out) as partial:
            made(partial / "new")

    with monkeypatch.context() as patch:
        patch.setattr(outputs.os, "replace", replace)
        patch.setattr(outputs.shutil, "rmtree", rmtree)
        with pytest.raises(Killed):
            export()
    said = outputs.finish_swap(out)
    assert (said is None) == (renames == 0)
    assert (out / "new").is_dir() == (renames > 0)
    outputs.check_output(out, {}, True, 0) if renames == 0 else None
    with outputs.new_folder(tmp_path / "other"):
        pass
    left = {"out", "other"} | ({"out.partial"} if renames == 0 else set())
    assert {p.name for p in tmp_path.iterdir()} == left
    assert renames == 0 or {p.name for p in out.iterdir()} == {"new"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("ours")])
def test_a_failed_export_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    out = made(tmp_path / "out", *MODEL)
    before = tree(tmp_path)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)), outputs.new_folder(out):
        raise error
    assert tree(tmp_path) == before


def test_only_what_belongs_to_a_model_is_copied(model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(model, tmp_path / "model")
    save_file(TENSORS, model / "spare.safetensors")
    for name in ("trainer_state.json", "training_args.json", "pytorch_model.bin.index.json", "optimizer.json",
                 "README.md", "LICENSE", "notes.txt", "eval_results.json", "adapter_config.json"):  # fmt: skip
        (model / name).write_text("{}", encoding="utf-8")
    (model / "tokenizer.model").mkdir()
    write_folder(tmp_path / "out", iter(TENSORS.items()), model, torch.float32)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE"}
    known = {"chat_template.jinja", "special_tokens_map.json", "model.safetensors"}
    assert names <= known | {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "LICENSE",
    }
    outputs.check_output(tmp_path / "out", {}, True, 0)
