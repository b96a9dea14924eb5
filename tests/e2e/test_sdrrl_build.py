"""copsd sdrrl with real parts: a translation model, a language identifier, the rollout engine; then training on it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from processes import PATIENCE, ROOT, Command, copsd, copsd_each, environment, metrics, train, wait_until
from tiny import make_model, settings, write_config
from tiny_nllb import make_nllb

LINES = {
    "Asha has four mangoes.": "Asha ana maembe manne.",
    "She buys two more.": "Ananunua mawili zaidi.",
    "How many mangoes has she?": "Ana maembe mangapi sasa?",
    "Four and two are six.": "Nne na mbili ni sita.",
}
KNOWN = ("\n".join(list(LINES)[:3]), "Four and two are six.\n#### 6")
UNKNOWN = ("Will Zeus zap 7 foxes?", "Vexed by why.\n#### 7")  # the model was not shown such words


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdrrl")
    asked = [KNOWN, UNKNOWN] * 5
    rows = [{"question": f"{question}", "answer": answer} for question, answer in asked]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "en_sw.txt").write_text("has ana\nmangoes maembe\ntwo mbili\n", encoding="utf-8")
    (folder / "corpus.tsv").write_text("Good day to you\tSiku njema kwako\n", encoding="utf-8")
    build = folder / "build"
    sdrrl = {
        "dir": str(build), "questions": {"path": str(folder / "train.jsonl"), "layout": "gsm8k"}, "targets": ["SWA"],
        "own_batch": 1, "quality": {"name": "off"},
        "translator": {"path": str(make_nllb(folder / "nllb", LINES, "swh_Latn")), "max_tokens": 60},
        "dictionaries": [{"language": "SWA", "path": str(folder / "en_sw.txt"), "form": "muse"}],
        "corpora": [{"language": "SWA", "path": str(folder / "corpus.tsv"), "count": 1}],
    }  # fmt: skip
    source = {"path": str(build / "rows.jsonl"), "layout": "subsets", "language": "SWA", "weight": "rows"}
    tree = settings(
        folder, make_model(folder / "model"), data={"train": [source]}, objective={"name": "sft"},
        loss={"reduction": "subset_mean"}, rollout={"max_response_tokens": 100},
    )  # fmt: skip
    return write_config(folder, {**tree, "sdrrl": sdrrl})


@pytest.fixture(scope="module")
def built(config: Path) -> subprocess.CompletedProcess[str]:
    return copsd("sdrrl", "build", config)


def rows_of(folder: Path, name: str = "rows") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_what_is_built(config: Path, built: subprocess.CompletedProcess[str]) -> None:
    assert built.returncode == 0, built.stderr
    assert "own responses: " in built.stderr
    folder = config.parent / "build"
    rows, rejected = rows_of(folder), rows_of(folder, "rejected")
    counts = Counter(row["subset"] for row in rows)
    assert counts["LL"] + sum(row["subset"] == "LL" for row in rejected) == 10
    assert counts["mt"] == 2
    assert counts["comp"] == 1
    translated = [row for row in rows if row["subset"] == "TT" and row["provenance"]["response"] == "data"]
    for row in translated:
        assert row["solution"] == "Nne na mbili ni sita.\n#### 6"
        assert row["provenance"]["solution_translated"] == {"quality": None, "language": "SWA"}
        assert row["provenance"]["problem_translated"]["language"] == "SWA"
    assert translated or all(row["provenance"]["response"] == "own" for row in rows if not row["verbatim"])
    assert any(row["reason"].startswith("the translation is in") for row in rejected)
    assert all(row["provenance"]["question"].startswith(str(config.parent)) for row in [*rows, *rejected])


def ended_or_long(process: subprocess.Popen[bytes], journal: Path, lines: int) -> bool:
    return process.poll() is not None or (journal.exists() and journal.read_bytes().count(b"\n") >= lines)


def test_killed_at_three_rows_and_resumed(
    config: Path, built: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    whole = config.parent / "build"
    for name, lines in (("responses", 1), ("translations", 1), ("translations", 3)):
        journal = tmp_path / f"{name}.jsonl"
        with (tmp_path / "log").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "copsd_tools.cli", "sdrrl", "build", str(config), f"sdrrl.dir={tmp_path}"],
                stdout=log, stderr=log, env=environment(), cwd=ROOT,
            )  # fmt: skip
        wait_until(partial(ended_or_long, process, journal, lines), every=0.001)
        process.kill()
        assert process.wait(PATIENCE) in (-signal.SIGKILL, 0), (tmp_path / "log").read_text(encoding="utf-8")
    again = copsd("sdrrl", "build", config, f"sdrrl.dir={tmp_path}")
    assert again.returncode == 0, again.stderr
    assert "going on with an earlier build" in again.stderr
    for name in ("rows.jsonl", "rejected.jsonl", "summary.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    for name in ("responses.jsonl", "translations.jsonl"):
        keys = [json.loads(line)["key"] for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
        assert len(keys) == len(set(keys))


def test_trained_on(config: Path, built: subprocess.CompletedProcess[str]) -> None:
    assert built.returncode == 0, built.stderr
    said = train(config)
    assert f"{len(rows_of(config.parent / 'build'))} SWA problems of" in said
    assert len(metrics(config.parent / "run")) == 3


MISTAKES = {
    "no dictionary": (("sdrrl.targets=[HAU]",), ("sdrrl.dictionaries", "there is none for HAU")),
    "a language that is not told": (
        (
            "sdrrl.targets=[HAU]", "sdrrl.subsets=[TT]", "sdrrl.code_switch=0", "sdrrl.dictionaries=[]",
            "sdrrl.corpora=[]",
        ),
        ("does not know HAU",),
    ),
    "a filter without weights": (("sdrrl.quality.name=cometkiwi",), ("sdrrl.quality.path", "sdrrl.quality.name: off")),
    "more questions than there are": (("sdrrl.questions.count=11",), ("sdrrl.questions.count", "has 10 rows")),
    "a corpus of no use": (("sdrrl.subsets=[LL]",), ("sdrrl.corpora: 'SWA'", "has a use for it")),
    "a subset twice": (("sdrrl.subsets=[LL,LL,mt]",), ("sdrrl.subsets: 'LL'", "named twice")),
    "a build in a run": (("sdrrl.dir=${run.dir}/build",), ("sdrrl.dir", "neither may lie in the other")),
    "no corpus": (("sdrrl.corpora=[]",), ("sdrrl.corpora", "leave mt and comp out")),
    "no table of translations": (
        ("sdrrl.translator={name: memory}",), ("sdrrl.translator.memories", "there is none for SWA"),
    ),
    "beams of a table": (
        ("sdrrl.translator.name=memory",),
        ("sdrrl.translator.path", "has no effect with sdrrl.translator.name = memory"),
    ),
    "a folder that is not converted": (
        ("sdrrl.translator.name=ctranslate2",), ("sdrrl.translator.path", "model.bin in it: no such file"),
    ),
    "other settings": (("run.seed=99",), ("run.seed", "was begun with 3", "--overwrite")),
}  # fmt: skip


def test_mistakes(config: Path, built: subprocess.CompletedProcess[str], tmp_path: Path) -> None:
    folder = config.parent / "build"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    commands = [Command(("sdrrl", "build", config, *arguments)) for arguments, _ in MISTAKES.values()]
    for done, (_, parts) in zip(copsd_each(commands, tmp_path), MISTAKES.values(), strict=True):
        assert done.returncode == 2, done.stdout
        assert all(part in done.stderr for part in parts), done.stderr
        assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_other_data_of_the_same_name_are_not_mixed_in(
    config: Path, built: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    """A line more at the top would give every question the translation of the one before."""
    questions = config.parent / "train.jsonl"
    before = questions.read_text(encoding="utf-8")
    try:
        questions.write_text(before + before.splitlines()[0] + "\n", encoding="utf-8")
        done = copsd("sdrrl", "build", config)
    finally:
        questions.write_text(before, encoding="utf-8")
    assert done.returncode == 2
    assert f"{questions} (its content)" in done.stderr


def test_shown(config: Path, built: subprocess.CompletedProcess[str], tmp_path: Path) -> None:
    folder = config.parent / "build"
    counts = copsd("sdrrl", "show", folder, "--plot", tmp_path / "counts.png")
    assert counts.returncode == 0, counts.stderr
    assert "the translation is in" in " ".join(counts.stdout.split())
    assert (tmp_path / "counts.png").stat().st_size > 5000
    row = copsd("sdrrl", "show", folder, "--rows", 1, "--subset", "comp")
    assert "Siku njema kwako" in row.stdout
    missing = copsd("sdrrl", "show", tmp_path)
    assert missing.returncode == 2
    assert "no finished build is there" in missing.stderr
