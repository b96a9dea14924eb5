"""``copsd show-prompts``: both prompts of a row, as training and evaluation have them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_model, settings, write_config

from copsd_tools.cli import main


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "held_out.tsv").write_text("Maembe 3?\t3\n")
    tree = settings(folder, make_model(folder / "model"))
    held_out = {"name": "held-out", "path": str(folder / "held_out.tsv"), "layout": "parallel", "language": "SWA"}
    tree["data"]["eval"] = [held_out]
    return write_config(folder, tree)


def test_both_roles_of_the_first_rows(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show-prompts", str(config), "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count(", student: ") == out.count(", teacher: ") == 2
    first = out.split("=== ")[1:3]
    student, teacher = (text.partition("\n")[2].strip() for text in first)
    assert len(teacher) > len(student)
    assert student.splitlines()[0] in teacher


def test_what_is_asked_in_evaluation(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show-prompts", str(config), "--held-out"]) == 0
    out = capsys.readouterr().out
    assert "Maembe 3?" in out
    assert "teacher" not in out


def test_prompts_over_their_limit_are_said(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show-prompts", str(config), "prompt.max_student_tokens=1", "--rows", "1"]) == 0
    assert "dropped, a prompt is over its limit" in capsys.readouterr().out


def test_no_held_out_problems(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show-prompts", str(config), "data.eval=[]", "--held-out"]) == 2
    assert "data.eval: None: the configuration has no held-out problems" in capsys.readouterr().err
