"""Accuracy metrics against hand-made cases and against enumeration."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from megatron_copsd.errors import UserError
from megatron_copsd.evaluate.metrics import accuracy_report, repetition_rate, wilson_interval

BOX = r"\boxed{%s}"


def test_every_convention_on_one_example() -> None:
    texts = [
        [BOX % 1, BOX % 1, BOX % 2],  # majority right
        [BOX % 1, BOX % "2.0", BOX % r"\frac{4}{2}"],  # equal numbers vote together, and outvote the right one
        ["no idea", "none", "no"],  # nothing extracted
        ["it is 1", BOX % 3, BOX % 4],  # a tie goes to the first answer, which is right
    ]
    report = accuracy_report(texts, ["1", "1", "1", "1"])
    assert report.correct == (2, 1, 0, 1)
    numbers = report.numbers()
    assert numbers["accuracy"] == pytest.approx(4 / 12)
    assert numbers["pass@3"] == 0.75
    assert numbers["maj@3"] == 0.5
    assert numbers["format_rate"] == pytest.approx(8 / 12)
    assert "33.3 %" in report.summary()


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_mean_over_subsets(k: int) -> None:
    counts = (0, 1, 2, 5)
    texts = [[BOX % (1 if i < count else 2) for i in range(5)] for count in counts]
    report = accuracy_report(texts, ["1"] * 4)
    subsets = list(itertools.combinations(range(5), k))
    expected = sum(any(i < count for i in subset) for count in counts for subset in subsets) / (len(subsets) * 4)
    assert report.pass_at(k) == pytest.approx(expected)


def test_single_greedy_answer_reports_no_vote() -> None:
    assert set(accuracy_report([["18"]], ["18"]).numbers()) == {
        "accuracy", "accuracy_low", "accuracy_high", "format_rate", "repetition",
    }  # fmt: skip


def test_missing_answer_is_an_error() -> None:
    with pytest.raises(UserError, match="held-out problem 2"):
        accuracy_report([["1"], ["1"]], ["1", None])
    with pytest.raises(UserError, match="held-out problem 1: ' '"):
        accuracy_report([["1"]], [" "])


def test_no_problems_is_an_error() -> None:
    with pytest.raises(UserError, match="nothing to evaluate"):
        accuracy_report([], [])


def test_wilson_interval_against_known_values() -> None:
    low, high = wilson_interval(0.5, 100)
    assert low == pytest.approx(0.4038, abs=1e-4)
    assert high == pytest.approx(0.5962, abs=1e-4)
    assert wilson_interval(0.0, 10)[0] == 0.0
    assert wilson_interval(1.0, 10)[1] == pytest.approx(1.0)


def test_repetition() -> None:
    assert repetition_rate("a b c") == 0.0
    assert repetition_rate("a b c d e f") == 0.0
    assert repetition_rate("a b c d " * 4) == pytest.approx(1 - 4 / 13)


def test_repetition_in_scripts_without_spaces() -> None:
    assert repetition_rate("答案是十八") == 0.0
    assert repetition_rate("好好好好好好") == pytest.approx(2 / 3)
    assert repetition_rate("মোট টাকা আঠারো হল") == 0.0


@pytest.mark.parametrize(
    ("answers", "right"),
    [
        ([7, 7, 18, r"\$18", "18 dollars"], True),
        (["১৮", 7, 18, 7, "18.0"], True),
        ([7, 18, "18.0", 7], False),  # a tie goes to the first seen
        (["", "", "", 18], True),  # an empty box does not vote
        (["", "", "", ""], False),
    ],
)
def test_votes_are_cast_for_what_an_answer_means(answers: list[object], right: bool) -> None:
    report = accuracy_report([[BOX % answer for answer in answers]], ["18"])
    assert report.majority == float(right)


def test_votes_and_grades_agree_on_answers_with_two_readings() -> None:
    report = accuracy_report([[BOX % "2.125"] * 3], ["2125"])
    assert (report.accuracy, report.majority) == (1.0, 1.0)


@pytest.mark.parametrize(("count", "total"), [(0, 10), (1, 10), (37, 250), (250, 250)])
def test_wilson_bounds_solve_the_score_equation(count: int, total: int) -> None:
    share = count / total
    for bound in wilson_interval(share, total):
        z_squared_variance = 1.959963984540054**2 * bound * (1 - bound) / total
        assert (share - bound) ** 2 == pytest.approx(z_squared_variance, abs=1e-12)


def test_metrics_need_neither_torch_nor_sacrebleu() -> None:
    code = "import sys, megatron_copsd.evaluate.metrics; print(sorted({'torch', 'sacrebleu'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
