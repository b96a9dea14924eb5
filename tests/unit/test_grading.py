"""Finding and comparing final answers."""

from __future__ import annotations

import pytest
from processes import SHARED_DATA

from megatron_copsd.errors import UserError
from megatron_copsd.eval.grading import extract_answer, grade, reward

RIGHT = [
    # What a common evaluator of this field gets wrong: money, units, other scripts' digits, spaces.
    (r"\$18", "18"), ("18 dollars", "18"), ("18 dola", "18"), (r"18\%", "18"), (r"18\text{ dola}", "18"),
    ("$18", "18"), ("x=18", "18"), ("x = 18", "18"), ("1,000", "1000"), ("70,000", "70000"), ("1 000", "1000"),
    ("১৮", "18"), ("१८", "18"), ("౧౮", "18"), ("๑๘", "18"), ("١٨", "18"), ("１８", "18"), ("፲፰", "18"),
    ("18.0", "18"), ("18.", "18"), ("€18,50", "18.5"), ("18,50 €", "18.5"), ("KSh 1,250", "1250"),
    ("1\u202f234\u202f567", "1234567"), ("1\u00a0234,5", "1234.5"), ("1.234.567", "1234567"), ("1.234,5", "1234.5"),
    ("1,234.50", "1234.5"), ("1,00,000", "100000"), ("12,34,567", "1234567"), ("1'000", "1000"), ("1{,}000", "1000"),
    ("١٬٠٠٠", "1000"), ("١٫٥", "1.5"),
    ("-3", "-3"), ("\u22123", "-3"), ("$-3", "-3"), ("1e3", "1000"), ("1.5e3", "1500"),
    (r"\frac{1}{2}", "0.5"), (r"\dfrac{3}{4}", "0.75"), ("3/4", "0.75"), ("1 1/2", "1.5"), (r"1\frac{1}{2}", "1.5"),
    (r"-\frac{1}{2}", "-0.5"), ("½", "0.5"), ("2½", "2.5"), ("6/3", "2"), ("18 %", "18"), ("፩፻", "100"), ("፪፻፲፰", "218"),
    ("十八", "18"), ("一百零五个", "105"), ("两万", "20000"), ("1.000", "1"), ("about 18 eggs", "18"), ("Jibu ni 18.", "18"),
    (r"\text{A}", "A"), ("A", "a"),
]  # fmt: skip
WRONG = [
    ("18", "81"), ("1,000", "1"), ("1.5", "15"), ("3/4", "0.7"), ("-3", "3"), ("", "18"), ("none", "18"), ("1/0", "0"),
    ("18 or 19", "18"), ("0.333", "1/3"), ("180", "18"), ("18.01", "18"),
]  # fmt: skip


@pytest.mark.parametrize(("prediction", "reference"), RIGHT)
def test_right(prediction: str, reference: str) -> None:
    assert grade(prediction, reference)


@pytest.mark.parametrize(("prediction", "reference"), WRONG)
def test_wrong(prediction: str, reference: str) -> None:
    assert not grade(prediction, reference)


@pytest.mark.parametrize(
    ("text", "value", "method"),
    [
        (r"so \boxed{18}", "18", "boxed"),
        (r"wrong \boxed{1}, corrected \boxed{18}", "18", "boxed"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", "boxed"),
        (r"\boxed{18} and then \boxed{19", "18", "boxed"),
        (r"\boxed{18} and an empty \boxed{}", "18", "boxed"),
        (r"<think>\boxed{1}</think> The answer is \boxed{18}.", "18", "boxed"),
        (r"<think>maybe \boxed{1}</think> It is 18.", "18", "last_number"),
        (r"<think>\boxed{18}</think>", "18", "boxed"),
        ("12 + 6 = 18 #### 18", "18", "marker"),
        ("#### 1\n#### 18", "18", "marker"),
        ("12 + 6 = 18 dola", "18", "last_number"),
        ("jumla ni 1,250 KSh", "1,250", "last_number"),
        ("it is -4", "-4", "last_number"),
    ],
)
def test_extraction(text: str, value: str, method: str) -> None:
    found = extract_answer(text)
    assert found is not None
    assert (found.value, found.method) == (value, method)


def test_nothing_to_extract() -> None:
    assert extract_answer("I do not know.") is None
    assert extract_answer(r"\boxed{}") is None
    assert extract_answer("") is None


def test_reward() -> None:
    assert reward(r"... \boxed{18}", "18.0") == 1.0
    assert reward(r"... \boxed{19}", "18") == 0.0
    assert reward("", "18") == 0.0
    with pytest.raises(UserError, match="no answer"):
        reward("18", None)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs the GSM8K and MGSM files of ../shared/data")
def test_public_answers_grade_themselves() -> None:
    for file in sorted((SHARED_DATA / "mgsm").glob("*.tsv")):
        for line in file.read_text(encoding="utf-8").splitlines():
            answer = line.rpartition("\t")[2]
            assert reward(rf"... \boxed{{\${answer}}}", answer.replace(",", "")) == 1.0
