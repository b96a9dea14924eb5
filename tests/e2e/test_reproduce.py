"""copsd reproduce: from a recipe's data to its numbers, and what is said of what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import ROOT, copsd
from tiny import make_model, settings, write_config

from megatron_copsd.config.load import load_config
from megatron_copsd.config.schema import Config


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rows = [{"question": f"{n} mangoes and two?", "answer": f"{n} and 2. #### {n + 2}"} for n in range(3, 9)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held_out.tsv").write_text("Maembe 3 na 2?\t5\nMaembe 4 na 2?\t6\n")
    build = tmp_path / "build"
    tree = settings(
        tmp_path, make_model(tmp_path / "model"),
        data={
            "train": [{"path": str(build / "rows.jsonl"), "layout": "subsets", "language": "SWA", "weight": "rows"}],
            "eval": [{
                "name": "held-out", "path": str(tmp_path / "held_out.tsv"), "layout": "parallel", "language": "SWA",
            }],
        },
        objective={"name": "sft"}, loss={"reduction": "subset_mean"},
        rollout={"max_response_tokens": 40},
    )  # fmt: skip
    sdrrl = {
        "dir": str(build), "questions": {"path": str(tmp_path / "questions.jsonl"), "layout": "gsm8k"},
        "targets": ["SWA"], "subsets": ["LL"], "own_share": 0.0, "code_switch": 0.0,
    }  # fmt: skip
    needs = [
        {"paths": [str(tmp_path / "questions.jsonl")], "kind": "file", "source": "a test", "gb": 0.1, "licence": "MIT"}
    ]
    expected = [{"source": "held-out", "percent": 12.5, "reported": "nobody, table 0"}]
    about = {"reproduces": "a table", "needs": needs, "expected": expected}
    return write_config(tmp_path, {**tree, "sdrrl": sdrrl, "recipe": about})


def test_from_data_to_numbers_and_nothing_twice(recipe: Path) -> None:
    first = copsd("reproduce", recipe)
    assert first.returncode == 0, first.stderr
    commands = [line.split()[2] for line in first.stdout.splitlines() if line.startswith("$ copsd")]
    assert commands == ["sdrrl", "train", "export", "evaluate"]
    assert "reproduces: a table" in first.stdout
    row = next(line for line in first.stdout.splitlines() if line.startswith("| held-out | accuracy |"))
    assert row.endswith("| 12.5 | nobody, table 0 |")
    run = recipe.parent / "run"
    made = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "lock"}
    again = copsd("reproduce", recipe)
    assert again.returncode == 0, again.stderr
    assert "nothing to do: all 3 steps are done" in again.stdout
    assert row in again.stdout
    assert made == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "lock"}


def test_what_is_missing_is_told_before_anything_is_made(recipe: Path) -> None:
    (recipe.parent / "questions.jsonl").unlink()
    for words in (["--check"], []):
        done = copsd("reproduce", recipe, *words)
        assert done.returncode == 2
        assert "questions.jsonl': no such file or folder. Get it: 0.1 GB; MIT; a test." in done.stderr
        assert not (recipe.parent / "build").exists()
        assert not (recipe.parent / "run").exists()


def test_numbers_of_something_else(recipe: Path) -> None:
    assert copsd("reproduce", recipe).returncode == 0
    (recipe.parent / "run" / "evaluation_3.json").write_text('{"held-out": 5}')
    done = copsd("reproduce", recipe)
    assert done.returncode == 2
    assert "evaluation_3.json" in done.stderr
    assert "is not what copsd evaluate writes" in done.stderr


def test_a_number_of_no_source(recipe: Path) -> None:
    built = copsd("sdrrl", "build", recipe)
    assert built.returncode == 0, built.stderr
    done = copsd("train", recipe, "--check", "recipe.expected.0.source=afrimgsm")
    assert done.returncode == 2
    assert "recipe.expected.0.source: 'afrimgsm': is none of data.eval (held-out)" in done.stderr


RECIPES = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if "\nrecipe:" in path.read_text()]


def outside(config: Config) -> set[str]:
    """Every path and hub name that a recipe reads and does not make."""
    sdrrl = config.sdrrl
    sources = [*config.data.train, *config.data.validation, *config.data.eval]
    found = {config.model.path, *(path for one in sources for path in (one.path, one.english, one.solutions) if path)}
    found |= {one.path for files in (sdrrl.dictionaries, sdrrl.corpora, sdrrl.translator.memories) for one in files}
    if sdrrl.questions:
        found.add(sdrrl.questions.path)
    if sdrrl.translates:
        found |= {sdrrl.quality.path or "", sdrrl.identifier.path or ""} - {""}
        if sdrrl.translator.name in ("nllb", "ctranslate2"):
            found.add(sdrrl.translator.path)
    return {path for path in found if not sdrrl.dir or not path.startswith(sdrrl.dir)}


@pytest.mark.parametrize("file", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_all_it_needs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COPSD_DATA", raising=False)
    config = load_config(file).config
    assert outside(config) == {path for need in config.recipe.needs for path in need.paths}


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 2
