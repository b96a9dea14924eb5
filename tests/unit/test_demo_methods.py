"""``copsd demo --methods``: what is refused, what each method sets, and the table of results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from copsd_tools.cli import main
from copsd_tools.demo.comparison import NUMBERS, PICTURE, TABLE, report
from copsd_tools.demo.methods import (
    METHODS,
    Sampled,
    Supervised,
    _draws,
    _problem_sources,
    _rows_settings,
    _write_materials,
    run_folder,
)
from copsd_tools.demo.problems import DICTIONARY, TEMPLATES, THINGS, word_problems
from copsd_tools.demo.stages import CONFIGS, Folders, source_paths
from megatron_copsd.config.check import check
from megatron_copsd.config.load import load_config
from megatron_copsd.config.sections.sdrrl import build_problems
from megatron_copsd.evaluate.metrics import wilson_interval
from megatron_copsd.languages import language
from megatron_copsd.records.paths import RunFolder

SUPERVISED = [name for name, recipe in METHODS.items() if isinstance(recipe, Supervised)]
SAMPLED = [name for name, recipe in METHODS.items() if isinstance(recipe, Sampled)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "copsd,magic"], "'magic': is none of copsd, opsd,"),
        (["--methods", "sft,sft"], "'sft': is named twice"),
        (["--methods", ""], "'': is none of"),
        (["--methods", "sft", "--seeds", "0"], "at least 1"),
        (["--seeds", "2"], "--methods is not given"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["demo", *arguments])
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    made = Folders(tmp_path_factory.mktemp("methods"))
    assert main(["demo-data", "--out", str(made.data), "--train", "60", "--held-out", "10"]) == 0
    made.base.mkdir(parents=True)
    (made.base / "tokenizer.json").write_bytes((made.data / "model" / "tokenizer.json").read_bytes())
    _write_materials(made)
    return made


def test_no_method_writes_where_a_stage_does(folders: Folders) -> None:
    """A method whose folder is a stage's would find its work done."""
    stages = [folders.data, folders.sft, folders.copsd]
    for method in METHODS:
        run = run_folder(folders, method)
        assert not any(run == stage or stage in run.parents or run in stage.parents for stage in stages)


@pytest.mark.parametrize("method", SUPERVISED)
def test_settings_of_each_supervised_method_make_a_build(method: str, folders: Folders) -> None:
    recipe = METHODS[method]
    assert isinstance(recipe, Supervised)
    settings = _rows_settings(recipe, folders, folders.out / "rows")
    config = load_config(str(CONFIGS / "demo_sdrrl.yaml"), settings).config
    assert build_problems(config) == []
    assert (tuple(config.sdrrl.subsets), config.sdrrl.own_share) == (tuple(recipe.subsets), recipe.own_share)


@pytest.mark.parametrize("method", SAMPLED)
def test_settings_of_each_sampling_method_make_a_run_of_as_many_responses(method: str, folders: Folders) -> None:
    recipe = METHODS[method]
    assert isinstance(recipe, Sampled)
    settings = [*_problem_sources(folders, recipe.languages), *recipe.settings]
    settings += source_paths(folders, "eval", ("sw", "en"))
    loaded = load_config(str(CONFIGS / "demo_copsd.yaml"), settings)
    check(loaded)
    rollout = loaded.config.rollout
    assert rollout.prompts_per_step * rollout.samples_per_prompt == 48
    assert {language(source.language).code for source in loaded.config.data.train} == {
        {"sw": "SWA", "en": "EN"}[name] for name in recipe.languages
    }


def test_a_folder_whose_name_looks_like_a_reference_is_itself() -> None:
    settings = _problem_sources(Folders(Path("a${run.name}")), ("en",))
    config = load_config(str(CONFIGS / "demo_copsd.yaml"), settings).config
    assert config.data.train[0].path == "a${run.name}/data/train_en.jsonl"


def test_draws_hold_as_many_tokens_as_copsd(folders: Folders, tmp_path: Path) -> None:
    """Rows of the solutions themselves: as many draws as COPSD has; two rows a draw: half as many."""
    questions = [
        json.loads(line)["answer"] for line in (folders.out / "supervised" / "questions.jsonl").read_text().splitlines()
    ]
    config = load_config(str(CONFIGS / "demo_copsd.yaml"), []).config
    for copies in (1, 2):
        rows = tmp_path / f"{copies}.jsonl"
        lines = [
            json.dumps({"group": str(i), "solution": text}) for i, text in enumerate(questions) for _ in range(copies)
        ]
        rows.write_text("\n".join(lines))
        found = _draws(folders, rows, str(CONFIGS / "demo_sdrrl.yaml"), [])
        assert found == config.rollout.prompts_per_step // copies


def test_words_of_the_dictionary_are_words_of_both_sentences() -> None:
    english, swahili = (
        " ".join(getattr(template, language) for template in TEMPLATES).lower() for language in ("english", "swahili")
    )
    for word, other in DICTIONARY.items():
        if word not in {thing.english for thing in THINGS}:
            assert word in english
            assert other in swahili
    assert all(problem.english != problem.swahili for problem, _ in zip(word_problems(0), range(50), strict=False))


def _run(folder: Path, swahili: float, tokens: list[int]) -> None:
    run = RunFolder(folder)
    run.begin()
    lines: list[dict[str, float]] = [
        {"step": i, "loss": 1.0, "num_loss_tokens": count, "seconds/student": 2.0, "seconds/update": 0.5}
        for i, count in enumerate(tokens, start=1)
    ]
    shares = {"swahili": swahili, "english": 1.0}
    lines.append({"step": 1, **{f"eval/{name}/accuracy": 0.0 for name in shares}, "eval/swahili/format_rate": 0.0})
    end: dict[str, float] = {"step": len(tokens)}
    for name, share in shares.items():
        end |= {f"eval/{name}/accuracy": share, f"eval/{name}/format_rate": 1.0 if name == "english" else 0.5}
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in [*lines, end]))


def test_table_pools_the_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {seed: Folders(tmp_path / f"seed_{seed}") for seed in (0, 1)}
    for seed, folders in parts.items():
        _run(folders.sft, 0.25, [7])
        _run(run_folder(folders, "xcot"), 0.5, [7])
        _run(run_folder(folders, "copsd"), (0.9, 0.7)[seed], [100, 200])
        folders.data.mkdir()
        (folders.data / "heldout_sw.jsonl").write_text("{}\n" * 20)
    report(tmp_path, parts, ["xcot", "copsd"])
    lines = (tmp_path / TABLE).read_text().splitlines()
    low, high = (100 * bound for bound in wilson_interval(0.8, 40))
    assert lines[4] == (
        f"| copsd | 80.0 ({low:.1f}-{high:.1f}) | 90.0 70.0 | 100.0 (91.2-100.0) | 100.0 100.0 | 75.0 | 300 | 60 |"
    )
    assert lines[2].startswith("| base | 25.0")
    assert lines[2].endswith("| - | - |")
    assert lines[4] in capsys.readouterr().out
    numbers = json.loads((tmp_path / NUMBERS).read_text())
    assert numbers["methods"]["copsd"]["1"]["accuracy"]["swahili"] == 0.7
    assert (tmp_path / PICTURE).stat().st_size > 5000


def test_fresh_deletes_what_a_comparison_made_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m"
    Folders(out / "seed_0").data.mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    assert main(["demo", "--methods", "sft", "--fresh", "--out", str(out)]) == 2
    assert "notes.txt is none of its parts" in capsys.readouterr().err
    assert (out / "notes.txt").read_text() == "mine"
