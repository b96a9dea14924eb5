"""Rows of several subsets: read as they stand, variants drawn together, weighed so that subsets count alike."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import settings, write_config

from megatron_copsd.config.check import check
from megatron_copsd.config.load import load_config
from megatron_copsd.config.schema import DataSource
from megatron_copsd.data.problems import load_problems
from megatron_copsd.data.subsets import Unit, shares, units, weigh
from megatron_copsd.errors import UserError
from megatron_copsd.types import Problem, PromptPair, Rollout

ROW = {
    "subset": "LT", "group": "a:1", "target": "SWA", "language": "SWA", "problem": "Two?", "solution": "Mbili.",
    "verbatim": False,
}  # fmt: skip


def source(path: Path | str = "rows.jsonl", **settings: Any) -> DataSource:
    return DataSource(**{"path": str(path), "layout": "subsets", "language": "SWA", **settings})


def load(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> tuple[Problem, ...]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_problems(source(path, **settings), "data.train.0").problems


def item(subset: str | None, group: str | None = None) -> tuple[PromptPair, Rollout | None]:
    return PromptPair(Problem("id", "SWA", "?", subset=subset, group=group), (1,), (1,)), None


def test_rows_of_the_language_and_of_the_subsets_asked_for(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "subset": "LL", "language": "EN"}, {**ROW, "target": "YOR"}, {**ROW, "subset": "mt"}]
    found = load(tmp_path, rows, subsets=["LL", "LT"])
    assert [(p.subset, p.language, p.problem, p.solution, p.group) for p in found] == [
        ("LT", "SWA", "Two?", "Mbili.", "a:1"), ("LL", "EN", "Two?", "Mbili.", "a:1"),
    ]  # fmt: skip
    assert [p.id for p in found] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert len(load(tmp_path, rows)) == 3
    assert len(load(tmp_path, rows, language="YOR")) == 1


@pytest.mark.parametrize(
    ("row", "settings", "parts"),
    [
        ({}, {"subsets": ["TT"]}, ("data.train.0.subsets", "'TT'", "it has LT")),
        ({"target": "xx-none"}, {}, ("rows.jsonl:1", "xx-none")),
        ({"language": "Klingon"}, {}, ("rows.jsonl:1", "Klingon")),
        ({"verbatim": "no"}, {}, ("rows.jsonl:1", "verbatim must be true or false")),
        ({"subset": ""}, {}, ("rows.jsonl:1", "subset is empty")),
        ({"group": None}, {}, ("rows.jsonl:1", "group must be a text")),
        ({"solution": 5}, {}, ("rows.jsonl:1", "solution must be a text")),
    ],
)
def test_malformed_rows(
    tmp_path: Path, row: dict[str, object], settings: dict[str, object], parts: tuple[str, ...]
) -> None:
    with pytest.raises(UserError, match=".*".join(map(re.escape, parts))):
        load(tmp_path, [{**ROW, **row}], **settings)


def test_variants_are_one_draw() -> None:
    items = [item("LL", "1"), item("LL", "2"), item(None), item("TT", "1"), item(None), item("mt", "3")]
    assert [[pair.problem.subset for pair, _ in unit] for unit in units(items)] == [
        ["LL", "TT"], ["LL"], [None], [None], ["mt"],
    ]  # fmt: skip


def by_subset(train: tuple[tuple[Unit, ...], ...]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for number, of_source in enumerate(train):
        for unit in of_source:
            for pair, _ in unit:
                found.setdefault(pair.problem.subset or f"source {number}", []).append(pair.subset_weight)
    return found


def test_an_epoch_is_the_sum_of_the_subset_means() -> None:
    first = units([item("LL", "1"), item("TT", "1"), item("LL", "2"), item("mt")])
    second = units([item("LL", "1"), item(None), item(None)])
    sources = (source(weight="rows"), source("other.jsonl", weight="rows"))
    assert shares(sources, (first, second)) == [0.5, 0.5]
    # 6 units in steps of 2: every response is trained on once in 3 steps, whose mean is the sum of the means.
    weights = by_subset(weigh(sources, (first, second), 2))
    assert weights == {"LL": [1.0] * 3, "TT": [3.0], "mt": [3.0], "source 1": [1.5] * 2}
    assert {name: sum(found) / 3 for name, found in weights.items()} == dict.fromkeys(weights, 1.0)


def test_a_source_that_comes_more_often_counts_less_each_time() -> None:
    train = (units([item("LL")] * 4), units([item("TT")] * 2))
    weights = by_subset(weigh((source(weight=3.0), source("other.jsonl", weight=1.0)), train, 8))
    # 6 of 8 draws are of the first source, each response 1.5 times; 2 of the second, each once.
    assert weights == {"LL": [pytest.approx(1 / 6)] * 4, "TT": [pytest.approx(1 / 2)] * 2}


@pytest.mark.parametrize(
    ("train", "objective", "rule"),
    [
        ([{"weight": "rows"}], "sft", None),
        ([{"weight": "rows"}, {"weight": "rows"}], "sft", None),
        ([{"weight": "rows"}, {}], "sft", r"data\.train \(weight\): .*one source counts its rows"),
        ([{"weight": 2.0}], "sft", r"data\.train\.0\.weight: 2\.0"),
        ([{"count": 3}], "sft", r"data\.train\.0\.count: 3: has no effect with layout = subsets"),
        ([{}], "copsd", r"data\.train\.0\.layout: 'subsets': .*Train with sft"),
    ],
)
def test_settings(tmp_path: Path, train: list[dict[str, Any]], objective: str, rule: str | None) -> None:
    (tmp_path / "rows.jsonl").touch()
    given = [{"path": str(tmp_path / "rows.jsonl"), "layout": "subsets", "language": "SWA", **one} for one in train]
    tree = settings(tmp_path, tmp_path, data={"train": given}, objective={"name": objective})
    loaded = load_config(str(write_config(tmp_path, tree)))
    if rule is None:
        check(loaded)
    else:
        with pytest.raises(UserError, match=rule):
            check(loaded)
