"""Problems from files: the three layouts, what is dropped and counted, and what every malformed row is told."""

import json
import os
import random
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset
from processes import PUBLIC_DATA
from pyarrow import parquet

from megatron_copsd.config.schema import DataSource
from megatron_copsd.data.problems import load_problems
from megatron_copsd.errors import UserError
from megatron_copsd.types import Problem

REFERENCE = {"problem": "Two and two?", "solution": "2 + 2 = 4", "problem_swa": "Mbili na mbili?"}
RELEASED = {
    "source": "math", "problem": "Two and two?", "solution": "2 + 2 = 4", "Answer": "4",
    "problem_translated": "Mbili na mbili?", "language": "Swahili", "language_short": "swa",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lines(name: str, *rows: object) -> str:
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return name


def load(path: str, layout: str = "reference", language: str = "SWA", **settings):
    return load_problems(DataSource(path=path, layout=layout, language=language, **settings), "data.train.0")


def refused(*parts: str) -> AbstractContextManager[object]:
    return pytest.raises(UserError, match=".*".join(map(re.escape, parts)))


def array(path: str, rows: list[dict]) -> None:
    Path(path).write_text(json.dumps(rows, indent=1), encoding="utf-8")


WRITERS: dict[str, Callable[[str, list[dict]], object]] = {
    "rows.jsonl": lambda path, rows: lines(path, *rows),
    "rows.json": array,
    "rows.parquet": lambda path, rows: Dataset.from_list(rows).to_parquet(path),
}


@pytest.mark.parametrize("path", WRITERS)
def test_reference_layout_in_every_format(path: str) -> None:
    ok = {**REFERENCE, "problem_swa_ok": True, "Answer": "4"}
    WRITERS[path](path, [ok, {**ok, "problem_swa_ok": False, "problem_swa": ""}, {**ok, "Answer": ""}])
    loaded = load(path)
    first = Problem(f"{path}:1", "SWA", "Mbili na mbili?", "Two and two?", "2 + 2 = 4", "4")
    assert loaded.problems == (first, replace(first, id=f"{path}:3", answer=None))
    assert loaded.rows == 3
    assert loaded.drops == {"problem_swa_ok is not true": 1}
    assert loaded.notes()[:2] == (
        f"{path}: 2 SWA problems of 3 rows",
        f"{path}: 1 rows dropped: problem_swa_ok is not true",
    )
    assert "no speaker" in loaded.notes()[-1]


def test_reference_column_may_use_any_code_of_the_language() -> None:
    path = lines("rows.jsonl", {"problem": "Two?", "solution": "2", "problem_sw": "Mbili?", "problem_ben": "দুই?"})
    assert load(path).problems[0].problem == "Mbili?"
    assert load(path, language="BN").problems[0].problem == "দুই?"
    with refused("rows.jsonl:1: 'problem_zul'", "lacks this column", "'problem_sw'"):
        load(path, language="ZUL")


def test_english_needs_no_translation() -> None:
    problem = load(lines("rows.jsonl", {"problem": "Two?", "solution": "2"}), language="EN").problems[0]
    assert problem == Problem("rows.jsonl:1", "EN", "Two?", "Two?", "2", None)


def test_texts_are_kept_apart_from_outer_white_space() -> None:
    row = {"problem": " It is 3 o\u2019clock.\n\nWhen?\n", "solution": "2", "problem_swa": "\tLini?", "Answer": 7}
    problem = load(lines("rows.jsonl", row)).problems[0]
    assert (problem.problem_en, problem.problem, problem.answer) == ("It is 3 o\u2019clock.\n\nWhen?", "Lini?", "7")


def test_values_that_look_like_dates_or_numbers_stay_texts() -> None:
    rows = [{**REFERENCE, "Answer": "2020-01-01"}, {**REFERENCE, "Answer": "007"}, {**REFERENCE, "Answer": 3}]
    assert [problem.answer for problem in load(lines("rows.jsonl", *rows)).problems] == ["2020-01-01", "007", "3"]


def test_released_layout_drops_and_counts_other_languages() -> None:
    other = {**RELEASED, "language": "Zulu", "language_short": "zul"}
    path = lines("rows.jsonl", other, RELEASED, other, {**RELEASED, "language_short": "SW", "Answer": None})
    loaded = load(path, "released")
    first = Problem("rows.jsonl:2", "SWA", "Mbili na mbili?", "Two and two?", "2 + 2 = 4", "4")
    assert loaded.problems == (first, replace(first, id="rows.jsonl:4", answer=None))
    assert loaded.drops == {"language_short is zul": 2}
    with refused("data.train.0.path: 'rows.jsonl'", "no BN problem is left of 4 rows", "2 rows dropped"):
        load(path, "released", "BN")


@pytest.mark.parametrize("column", ["problem", "solution", "Answer", "problem_translated", "language_short"])
def test_released_layout_needs_its_columns(column: str) -> None:
    row = {key: value for key, value in RELEASED.items() if key != column}
    with refused(f"rows.jsonl:2: '{column}'", "lacks this column"):
        load(lines("rows.jsonl", RELEASED, row), "released")


def test_first_and_count_choose_among_the_rows_of_the_language() -> None:
    rows = [{**RELEASED, "language_short": short} for short in ("zul", "swa", "swa", "zul", "swa", "swa")]
    path = lines("rows.jsonl", *rows)
    train, held_out = load(path, "released", count=2), load(path, "released", first=2)
    assert [problem.id for problem in train.problems] == ["rows.jsonl:2", "rows.jsonl:3"]
    assert [problem.id for problem in held_out.problems] == ["rows.jsonl:5", "rows.jsonl:6"]
    with refused("data.train.0.count: 3", "has 4 rows in this language", "reaches 5"):
        load(path, "released", first=2, count=3)
    with refused("data.train.0.first: 4"):
        load(path, "released", first=4)


def test_malformed_rows_outside_the_chosen_range_do_no_harm() -> None:
    path = lines("rows.jsonl", REFERENCE, {**REFERENCE, "solution": ""})
    assert len(load(path, count=1).problems) == 1


@pytest.mark.parametrize(
    ("value", "rule"),
    [(None, "must be a text"), (7, "must be a text"), (["x"], "must be a text"), ("", "empty"), (" \n", "empty"),
     ("\ud800", "surrogate")],
)  # fmt: skip
@pytest.mark.parametrize("column", ["problem", "solution", "problem_swa"])
def test_malformed_values_name_their_line(column: str, value: object, rule: str) -> None:
    Path("rows.jsonl").write_text(f"{json.dumps(REFERENCE)}\n\n{json.dumps({**REFERENCE, column: value})}\n")
    with refused("rows.jsonl:3: ", column, rule, "remove the row"):
        load("rows.jsonl")


@pytest.mark.parametrize("answer", [True, ["4"], {"value": 4}])
def test_answers_are_texts_or_numbers(answer: object) -> None:
    with refused("rows.jsonl:1: ", "Answer must be a text"):
        load(lines("rows.jsonl", {**REFERENCE, "Answer": answer}))


@pytest.mark.parametrize(
    ("name", "data", "parts"),
    [
        ("x.jsonl", b'{"a": "b"}\n{"a": \n', ("x.jsonl:2: '{\"a\": '", "not JSON")),
        ("x.jsonl", b'{"a": "b"}\n["a"]\n', ("x.jsonl:2: ", "must be a JSON object")),
        ("x.jsonl", b'{"a": "b"}\n\n{"a": "\xff"}\n', ("x.jsonl:3: b'\\xff'", "not UTF-8")),
        ("x.json", b'[{"a": "b"},\n {"a": }]', ("x.json:2: ", "not JSON")),
        ("x.json", b'[{"a": "b"}, 7]', ("x.json:1: '7'", "must be a JSON object")),
        ("x.json", b'[\n{"a": 1},\n\n{"b": 2, "b": 3}]', ("x.json:4: ", "the key 'b' stands twice")),
        ("x.json", b'[{"a": 1}, ]', ("x.json:1: ", "not JSON")),
        ("x.json", b'[{"a": 1}] [', ("x.json:1: ", "Extra data")),
        ("x.json", b'[{"a": 1}', ("x.json:1: ", "not JSON")),
        ("x.json", b"[" * 100_000, ("x.json:1: ", "too deep in each other")),
        ("x.jsonl", b'{}\n{"a": ' + b"[" * 100_000, ("x.jsonl:2: ", "too deep in each other")),
        ("x.jsonl", b'{}\n{"a": {"b": 1, "b": 2}}', ("x.jsonl:2: ", "the key 'b' stands twice")),
        ("x.jsonl", b'{}\n{"a": NaN}', ("x.jsonl:2: ", "NaN is no number")),
        ("x.jsonl", b'{}\n{"a": [-Infinity]}', ("x.jsonl:2: ", "-Infinity is no number")),
        ("x.jsonl", b'{"a": 1e400}', ("x.jsonl:1: ", "1e400 is too large")),
        ("x.jsonl", b'{"a": ' + b"1" * 5000 + b"}", ("x.jsonl:1: ", "a number of 5,000 digits")),
        ("x.jsonl", b'{"a": "b"}\n{"a": "\0"}\n', ("x.jsonl:2: ", "not JSON")),
        ("x.jsonl", b'{"problem_swa": "M\\u0000"}\n', ("x.jsonl:1: ", "problem_swa has a zero byte")),
        ("x.jsonl", '{"a": 1}'.encode("utf-16"), ("x.jsonl:1: b'\\xff'", "not UTF-8")),
        ("x.parquet", b"", ("x.parquet: ", "not a readable Parquet file")),
        ("x.json", b"", ("data.train.0.path: 'x.json'", "the file is empty")),
        ("x.jsonl", b"[]", ("data.train.0.path: 'x.jsonl'", "the file is empty")),
        ("x.parquet", b"PAR1 and no more", ("x.parquet: ", "not a readable Parquet file")),
        ("x.csv", b"a,b", ("data.train.0.path: 'x.csv'", ".jsonl")),
    ],
)
def test_malformed_files_name_their_line(name: str, data: bytes, parts: tuple[str, ...]) -> None:
    Path(name).write_bytes(data)
    with refused(*parts):
        load(name)


def test_a_byte_order_mark_and_carriage_returns_are_no_content() -> None:
    Path("x.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(REFERENCE).encode() + b"\r\n")
    assert len(load("x.jsonl").problems) == 1
    Path("x.tsv").write_bytes("\ufeffMbili?\t2\r\n".encode())
    assert load("x.tsv", "parallel").problems == (Problem("x.tsv:1", "SWA", "Mbili?", answer="2"),)


def test_places_that_are_no_files() -> None:
    Path("folder.jsonl").mkdir()
    os.mkfifo("pipe.jsonl")
    os.mkfifo("pipe.tsv")
    lines("rows.jsonl", REFERENCE)
    for path, rule in {
        "folder.jsonl": "is a folder",
        "pipe.jsonl": "is no regular file",
        f"{'x' * 300}.jsonl": "the name is too long",
        "x" * 300: "neither a file",
        "rows.jsonl/x.jsonl": "Not a directory",
        "/dev/zero": "is no regular file",
    }.items():
        with refused(f"data.train.0.path: '{path}'", rule):
            load(path)
    with refused("data.train.0.path: 'pipe.tsv'", "is no regular file"):
        load("pipe.tsv", "parallel")


def test_a_parquet_file_with_other_bytes() -> None:
    """Some are read as another value, which nothing can tell; none ends in anything but an error of ours."""
    Dataset.from_list([REFERENCE] * 4).to_parquet("good.parquet")
    good, chance = Path("good.parquet").read_bytes(), random.Random(3)
    refusals = 0
    for _ in range(60):
        other = bytearray(good)
        for _ in range(4):
            other[chance.randrange(len(other))] = chance.randrange(256)
        Path("x.parquet").write_bytes(other)
        try:
            load("x.parquet")
        except UserError:
            refusals += 1
    assert refusals > 30


def test_parquet_without_rows_and_with_a_column_twice() -> None:
    texts = pyarrow.array(["x"])
    parquet.write_table(pyarrow.table({"problem": texts[:0]}), "none.parquet")
    with refused("data.train.0.path: 'none.parquet'", "the file is empty"):
        load("none.parquet")
    parquet.write_table(pyarrow.Table.from_arrays([texts, texts], ["problem", "problem"]), "twice.parquet")
    with refused("twice.parquet: 'problem'", "two columns have this name"):
        load("twice.parquet")


def test_numbers_stay_as_they_are_written() -> None:
    Path("x.jsonl").write_text(f'{json.dumps(REFERENCE)[:-1]}, "Answer": 12345678901234567.890}}\n', encoding="utf-8")
    assert load("x.jsonl").problems[0].answer == "12345678901234567.890"


def test_two_columns_for_the_same_are_refused() -> None:
    with refused("rows.jsonl:2: 'problem_swa, problem_sw'", "several columns for the same"):
        load(lines("rows.jsonl", REFERENCE, {**REFERENCE, "problem_sw": "Mbili?"}))
    with refused("rows.jsonl:1: 'Answer, answer'", "several columns for the same"):
        load(lines("rows.jsonl", {**REFERENCE, "Answer": "4", "answer": "5"}))
    with refused("rows.jsonl:1: 'yes'", "problem_swa_ok must be true or false"):
        load(lines("rows.jsonl", {**REFERENCE, "problem_swa_ok": "yes"}))


def test_repeated_problems_are_said() -> None:
    other = {**REFERENCE, "problem_swa": "Tatu?"}
    loaded = load(lines("rows.jsonl", REFERENCE, other, REFERENCE, {**REFERENCE, "solution": "4"}))
    said = "rows.jsonl: 2 problems repeat an earlier row, such as rows.jsonl:3 that of rows.jsonl:1"
    assert said in loaded.notes()
    assert len(loaded.problems) == 4


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "there is no answer"), (" ", "there is no answer"), ("NaN", "stands for none"),
        ("-Infinity", "stands for none"), ("1e400", "too large"), ("$ .", "neither digits nor letters"),
        ("9" * 301, "more than 300 characters"),
    ],
)  # fmt: skip
def test_rows_that_nothing_can_be_graded_against(answer: str | None, reason: str) -> None:
    path = lines("rows.jsonl", RELEASED, {**RELEASED, "Answer": answer})
    source = DataSource(path=path, layout="released", language="SWA")
    with refused("rows.jsonl:2: ", reason, "data.ungradable"):
        load_problems(source, "data.train.0", "error")
    loaded = load_problems(source, "data.train.0", "drop")
    assert [problem.id for problem in loaded.problems] == ["rows.jsonl:1"]
    assert [reason in said for said in loaded.drops] == [True]
    assert len(load_problems(source, "data.train.0").problems) == 2


@pytest.mark.parametrize("answer", ["4", "1,000", "x + 1", "\\frac{1}{2}", "৫", "三", "(B)", 7, 2.50, "1e10"])
def test_answers_that_can_be_graded_against(answer: object) -> None:
    source = DataSource(path=lines("rows.jsonl", {**RELEASED, "Answer": answer}), layout="released", language="SWA")
    assert load_problems(source, "data.train.0", "error").problems[0].answer == str(answer)


@pytest.mark.parametrize("path", ["gone.jsonl", "gone.parquet", "gone", "a/b/gone"])
def test_missing_files_are_errors(path: str) -> None:
    with refused(f"data.train.0.path: '{path}'", "relative paths start at"):
        load(path)


def test_settings_that_do_not_fit_are_refused() -> None:
    path = lines("rows.jsonl", REFERENCE)
    with refused("data.train.0.language: 'SWAH'", "unknown language"):
        load(path, language="SWAH")
    with refused("data.train.0.split: 'test'", "a file has no splits"):
        load(path, split="test")
    with refused("data.train.0.english: 'en.tsv'", "everything in one file"):
        load(path, english="en.tsv")


def test_a_folder_is_read_like_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "cache")
    Path("copy").mkdir()
    Dataset.from_list([RELEASED]).to_parquet("copy/train-00000.parquet")
    Dataset.from_list([RELEASED, {**RELEASED, "solution": " "}]).to_parquet("copy/test-00000.parquet")
    assert load("copy", "released").problems[0].id == "copy[train]:1"
    with refused("copy[test] row 2: ", "solution is empty"):
        load("copy", "released", split="test")
    with refused("data.train.0.path: 'copy'", "split 'dev'", "cannot be loaded"):
        load("copy", "released", split="dev")


def test_a_hub_name_without_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with refused("data.train.0.path: 'owner/no-such-name'", "cannot be loaded", "without a network"):
        load("owner/no-such-name", "released")


def parallel_files(
    question: str = 'Janet\u2019s "two"?', solution_answer: str = "1 + 1 = 2\n#### 2", english_answer: str = "2"
) -> dict[str, str]:
    Path("sw.tsv").write_text("Moja?\t1,000\nMbili?\t2\n", encoding="utf-8")
    Path("en.tsv").write_text(f'One?\t1000\nJanet\'s  "two"?\t{english_answer}\n', encoding="utf-8")
    lines(
        "solutions.jsonl",
        {"question": "One?", "answer": "It is one.\n#### 1,000"},
        {"question": question, "answer": solution_answer},
        {"question": "Three?", "answer": "#### 3"},
    )
    return {"path": "sw.tsv", "layout": "parallel", "english": "en.tsv", "solutions": "solutions.jsonl"}


def test_parallel_layout_aligns_rows() -> None:
    loaded = load(**parallel_files())
    assert loaded.problems == (
        Problem("sw.tsv:1", "SWA", "Moja?", "One?", "It is one.\n#### 1,000", "1,000"),
        Problem("sw.tsv:2", "SWA", "Mbili?", 'Janet\'s  "two"?', "1 + 1 = 2\n#### 2", "2"),
    )
    assert load(**parallel_files(), first=1).problems == loaded.problems[1:]


def test_parallel_layout_without_privileged_files_serves_evaluation() -> None:
    parallel_files()
    assert load("sw.tsv", "parallel").problems[0] == Problem("sw.tsv:1", "SWA", "Moja?", answer="1,000")
    assert load("en.tsv", "parallel", "EN", solutions="solutions.jsonl").problems[0] == Problem(
        "en.tsv:1", "EN", "One?", "One?", "It is one.\n#### 1,000", "1000"
    )


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ({"question": "Another?"}, ("solutions.jsonl:2: 'Another?'", "not the question of en.tsv:2")),
        ({"solution_answer": "#### 3"}, ("solutions.jsonl:2: '3'", "differs from 2 of sw.tsv:2")),
        ({"solution_answer": "It is 2."}, ("solutions.jsonl:2: 'It is 2.'", "does not end with '#### answer'")),
        ({"solution_answer": "#### two"}, ("solutions.jsonl:2: 'two'", "not a number")),
        ({"english_answer": "3"}, ("en.tsv:2: '3'", "differs from 2 of sw.tsv:2")),
        ({"english_answer": ""}, ("en.tsv:2: ''", "answer is empty")),
    ],
)
def test_rows_that_are_not_aligned_name_both_places(files: dict[str, str], parts: tuple[str, ...]) -> None:
    settings = parallel_files(**files)
    with refused(*parts):
        load(**settings)


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (b"Moja?\t1\nMbili?\n", ("sw.tsv:2: 'Mbili?'", "1 tab-separated columns, not 2")),
        (b"Moja?\t1\nMbili?\t2\t3\n", ("sw.tsv:2: ", "3 tab-separated columns")),
        (b"Moja?\t1\n\nMbili?\t2\n", ("sw.tsv:2: ''", "1 tab-separated columns")),
        (b"Moja?\t1\nMbili?\ttwo\n", ("sw.tsv:2: 'two'", "not a number")),
        (b"Moja?\t1\nMbili?\t1,00\n", ("sw.tsv:2: '1,00'", "not a number")),
        (b"Moja?\t1\nMbili?\t2\xff\n", ("sw.tsv:2: b'\\xff'", "not UTF-8")),
        (b"Moja?\t1\n\t2\n", ("sw.tsv:2: ''", "question is empty")),
        (b"Moja?\t1000\n", ("data.train.0.english: 'en.tsv'", "it has 2 rows and sw.tsv has 1")),
    ],
)
def test_malformed_tsv_lines(data: bytes, parts: tuple[str, ...]) -> None:
    settings = parallel_files()
    Path("sw.tsv").write_bytes(data)
    if b"1000" not in data:
        settings = {"path": "sw.tsv", "layout": "parallel"}
    with refused(*parts):
        load(**settings)


def test_parallel_settings_that_do_not_fit_are_refused() -> None:
    settings = parallel_files()
    with refused("data.train.0.solutions: 'solutions.jsonl'", "english is not set"):
        load(**{**settings, "english": None})
    with refused("data.train.0.english: 'en.tsv'", "English already"):
        load(**{**settings, "language": "EN"})
    with refused("data.train.0.english: 'gone.tsv'", "no such file"):
        load(**{**settings, "english": "gone.tsv"})
    lines("short.jsonl", {"question": "One?", "answer": "#### 1"})
    with refused("data.train.0.solutions: 'short.jsonl'", "it has 1 rows and sw.tsv has 2"):
        load(**{**settings, "solutions": "short.jsonl"})


@pytest.mark.skipif(not (PUBLIC_DATA / "mgsm").is_dir(), reason="needs the MGSM and GSM8K files (COPSD_DATA)")
@pytest.mark.parametrize("code", ["SW", "BN", "TE", "TH", "ZH", "JA", "RU", "DE", "ES", "FR", "EN"])
def test_all_of_mgsm_aligns_with_gsm8k(code: str) -> None:
    mgsm = PUBLIC_DATA / "mgsm"
    english = None if code == "EN" else str(mgsm / "mgsm_en.tsv")
    loaded = load(
        str(mgsm / f"mgsm_{code.lower()}.tsv"), "parallel", code,
        english=english, solutions=str(PUBLIC_DATA / "gsm8k" / "test.jsonl"),
    )  # fmt: skip
    assert len(loaded.problems) == loaded.rows == 250
    assert not loaded.drops
    assert len({problem.id for problem in loaded.problems}) == 250
    assert all(problem.problem_en and problem.solution and problem.answer for problem in loaded.problems)
    assert loaded.problems[0].answer == "18"
    assert loaded.problems[0].solution.endswith("#### 18")
