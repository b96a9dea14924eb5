"""The demonstration's data: honest hold-out, right answers, and a tokenizer that spells every sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from copsd_tools.demo.data_command import main
from megatron_copsd.config.schema import DataSource, PromptSettings
from megatron_copsd.data.problems import load_problems
from megatron_copsd.data.prompts import PromptBuilder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    assert main(["--out", str(out), "--seed", "3"]) == 0
    return out


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_repeats_by_seed(folder: Path, tmp_path: Path) -> None:
    main(["--out", str(tmp_path / "same"), "--seed", "3"])
    main(["--out", str(tmp_path / "other"), "--seed", "4"])
    for name in ("train_sw.jsonl", "heldout_en.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
        assert (folder / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_held_out_sentences_are_unseen_in_every_language(folder: Path, tmp_path: Path) -> None:
    main(["--out", str(tmp_path), "--seed", "4"])
    for column in ("problem", "problem_translated"):
        train = {row[column] for name in ("train_en", "train_sw") for row in rows(folder / f"{name}.jsonl")}
        for other in (folder, tmp_path):  # the hold-out does not depend on the seed either
            held_out = {row[column] for name in ("heldout_en", "heldout_sw") for row in rows(other / f"{name}.jsonl")}
            assert not train & held_out


def test_answers_follow_from_the_sentences(folder: Path) -> None:
    for name in ("train_sw", "heldout_sw", "heldout_en"):
        for row in rows(folder / f"{name}.jsonl"):
            first, second = map(int, re.findall(r"\d+", row["problem_translated"]))
            a, operator, b, result = re.match(r"(\d+) ([-+x]) (\d+) = (\d+) #### \d+$", row["solution"]).groups()
            assert (int(a), int(b)) == (first, second)
            expected = {"+": first + second, "-": first - second, "x": first * second}[operator]
            assert int(result) == expected == int(row["Answer"]) >= 0


def test_every_number_fact_is_trained_on(folder: Path) -> None:
    trained = {row["solution"] for row in rows(folder / "train_en.jsonl")}
    tested = {row["solution"] for row in rows(folder / "heldout_en.jsonl")}
    assert len(tested - trained) <= 0.02 * len(tested)


@pytest.mark.parametrize(("name", "language"), [("train_sw", "SWA"), ("heldout_en", "EN")])
def test_prompts_survive_the_tokenizer(folder: Path, name: str, language: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    builder = PromptBuilder(tokenizer, PromptSettings(template="plain"))
    source = DataSource(path=str(folder / f"{name}.jsonl"), layout="released", language=language)
    for problem in load_problems(source, "data").problems[:300]:
        pair = builder.pair(problem)
        for ids, text in zip((pair.student_prompt, pair.teacher_prompt), builder.texts(problem), strict=True):
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
        assert tokenizer.decode(tokenizer(" " + problem.solution).input_ids) == " " + problem.solution
