"""What is given to commands and can't be: told before any work, with exit code 2 and nothing written."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from copsd_tools.bench.csv_lines import check_csv
from copsd_tools.bench.provenance import Provenance
from copsd_tools.cli import main
from copsd_tools.command_line.arguments import above_zero, override, path, positive, whole
from copsd_tools.command_line.outputs import check_file_and_parents, check_folder, check_new_file
from megatron_copsd.config.load import load_config
from megatron_copsd.errors import UserError

LONG = "x" * 300


@pytest.fixture(autouse=True)
def _things_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("of somebody's", encoding="utf-8")
    Path("folder/inner").mkdir(parents=True)
    os.mkfifo("pipe")
    Path("nowhere").symlink_to("gone")
    with zipfile.ZipFile("empty.whl", "w"):
        pass


def everything() -> dict[str, bytes | None]:
    found = {str(entry): entry for entry in Path().rglob("*")}
    return {name: entry.read_bytes() if entry.is_file() else None for name, entry in found.items()}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("demo-data", "--out", "file"), "--out: 'file': is no folder"),
        (("demo-data", "--out", "file/x"), "--out: 'file/x': can't be used: Not a directory"),
        (("demo-data", "--out", LONG), f"--out: '{LONG}': the name is too long"),
        (("demo-data", "--out", "nowhere"), "--out: 'nowhere': is a link to nothing"),
        (("demo", "--out", "pipe"), "--out: 'pipe': is no folder"),
        (("demo", "--out", "folder", "--fresh"), "--out: 'folder': --fresh deletes this folder, and it was not made"),
        (("smollm2", "--out", "file"), "--out: 'file': is no folder"),
        (("smollm2", "--out", "folder"), "--out: 'folder': is a file, or a folder with files in it"),
        (("smollm2", "--out", "new", "--wheel", "file"), "--wheel: 'file': is no complete wheel"),
        (("smollm2", "--out", "new", "--wheel", "gone.whl"), "--wheel: 'gone.whl': no such file"),
        (("smollm2", "--out", "new", "--wheel", "pipe"), "--wheel: 'pipe': is no regular file"),
        (("smollm2", "--out", "new", "--wheel", "empty.whl"), "--wheel: 'empty.whl': holds 0 .gguf files"),
        (("evaluate", "translation", "--hypotheses", "pipe", "--references", "file"), "pipe: 'pipe': is no regular"),
        (("evaluate", "translation", "--hypotheses", "file", "--references", "file", "--out", "folder"),
         "--out: 'folder': is a folder. Name a file."),
        (("evaluate", "accuracy", "c.yaml", "--out", "gone/x.json"), "it is to stand in is not there (gone)"),
        (("evaluate", "accuracy", "c.yaml", "--out", "file/x.json"), "can't be used: Not a directory"),
        (("export", "file", "--out", "new"), "RUN: 'file': the folder has no config.yaml"),
        (("bench", "loss", "--csv", "folder"), "--csv: 'folder': is a folder"),
        (("bench", "loss", "--csv", "file"), "file: 'of somebody\\'s': the file has other columns"),
        (("bench", "kernels", "--preset", "cpu", "--out", "file"), "--out: 'file': is no folder"),
        (("launch", "train", "pipe", "--on", "local"), "CONFIG: 'pipe': is no regular file"),
        (("serve", "folder"), "CONFIG: 'folder': is a folder"),
        (("plan", "gone.yaml", "--gpus", "8"), "CONFIG: 'gone.yaml': no such file"),
    ],
)  # fmt: skip
def test_what_is_in_the_way_is_told_first(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    before = everything()
    assert main(list(arguments)) == 2
    assert says.replace("\\'", "'") in capsys.readouterr().err.replace("\\'", "'").replace('"', "'")
    assert everything() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("demo", "--seed", "-1"), "argument --seed: '-1': must be a whole number of at least 0"),
        (("demo-data", "--train", "0"), "argument --train: '0': must be a whole number of at least 1"),
        (("demo-data", "--held-out", "1" * 5000), "must be a whole number of at least 1 and at most 9 digits"),
        (("demo-data", "--out", "~nobody_here/x"), "~nobody_here names no user's home folder"),
        (("demo-data", "--out", ""), "argument --out: '': is no path"),
        (("export", "run", "--out", "x", "--step", "-5"), "argument --step: '-5': must be a whole number"),
        (("bench", "loss", "--temperature", "nan"), "argument --temperature: 'nan': must be a number above 0"),
        (("bench", "loss", "--scratch-mb", "-3"), "argument --scratch-mb: '-3': must be a number above 0"),
        (("bench", "kernels", "--entry-clips", "0"), "argument --entry-clips: '0': must be a number above 0, or none"),
        (("launch", "train", "x", "--on", "local", "--job-dir", ""), "argument --job-dir: '': is no path"),
    ],
)
def test_arguments_that_are_none(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 2
    assert says in capsys.readouterr().err


def test_a_fresh_demonstration_deletes_only_a_demonstration(capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody's project has a folder named data, too."""
    Path("project/data").mkdir(parents=True)
    Path("project/thesis.tex").write_text("years of work", encoding="utf-8")
    assert main(["demo", "--out", "project", "--fresh"]) == 2
    assert "thesis.tex is none of its parts" in capsys.readouterr().err
    assert Path("project/thesis.tex").read_text(encoding="utf-8") == "years of work"


def test_a_fresh_environment_deletes_only_an_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COPSD_SGLANG_ENV", "folder")
    assert main(["sglang-env", "--fresh"]) == 2
    assert "it is no Python environment" in capsys.readouterr().err
    assert Path("folder/inner").is_dir()


def test_places_that_can_be_written() -> None:
    check_new_file(Path("new.json"), "--out")
    check_new_file(Path("file"), "--out")
    check_file_and_parents(Path("a/b/c.csv"), "--csv")
    check_folder(Path("a/b/c"), "--out")
    check_folder(Path("folder"), "--out")
    check_csv(Path("new.csv"), Provenance)
    check_csv(None, Provenance)
    assert not Path("a").exists()
    Path("binary").write_bytes(b"\xff\x00\xfe")
    with pytest.raises(UserError, match="is no CSV file"):
        check_csv(Path("binary"), Provenance)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_places_without_permission() -> None:
    Path("folder").chmod(0o500)
    with pytest.raises(UserError, match="nothing can be written there"):
        check_folder(Path("folder/new"), "--out")


def test_types_of_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/asha")
    assert path("~/x") == Path("/home/asha/x")
    assert (positive("7"), whole("0"), above_zero("1e-3")) == (7, 0, 1e-3)


@pytest.mark.parametrize(
    "text", ["plain/x", "a: b", "[x]", "7", "null", "a #b", "${run.name}", "\\${x}", "it's", 'say "x"', "Ώ", " "]
)
def test_overrides_of_texts_say_the_text(tmp_path: Path, text: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "model: {path: m}\ndata: {train: [{path: a/b, layout: released, language: SWA}]}\n", encoding="utf-8"
    )
    assert load_config(config, [override("run.dir", text)]).config.run.dir == text
