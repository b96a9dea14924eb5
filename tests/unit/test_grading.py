"""Final answers: where they are found in a response, what they are worth, and that wrong ones stay wrong."""

import json
import time
import unicodedata
from fractions import Fraction

import pytest
from processes import PUBLIC_DATA

from megatron_copsd.errors import UserError
from megatron_copsd.grading.answers import answer_key, extract_answer, grade, reward
from megatron_copsd.grading.numbers import readings


def value(text: str) -> Fraction | None:
    found = readings(text)
    return found[0] if found else None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"So it is \boxed{18}.", "18"),
        (r"\boxed{1} no, \boxed{18}", "18"),
        (r"\boxed{18} and the total is \boxed{2", "18"),
        (r"\boxed{18} so \boxed", "18"),
        (r"\boxed{18} \boxed{}", "18"),
        (r"\boxed{18} \boxed{  }", "18"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {18}", "18"),
        (r"\boxed{x = \boxed{18}}", "18"),
        (r"{ unbalanced \boxed{18}", "18"),
        (r"unbalanced } \boxed{18}", "18"),
        (r"<think>\boxed{5}</think> It is \boxed{18}.", "18"),
        (r"<think>\boxed{18}</think> Ni rahisi.", "18"),
        (r"<think> so \boxed{18}", "18"),
    ],
)
def test_box(text: str, expected: str) -> None:
    found = extract_answer(text)
    assert found is not None
    assert (found.value, found.method) == (expected, "boxed")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16 - 3 = 13\n#### 18", "18"),
        ("#### 18\nOne more thing: 7 eggs.", "18"),
        ("#### 5\n#### 18 dollars", "18 dollars"),
        ("#### 18 ####", "18"),
        ("#### 18\n####", "18"),
        ("#### 16 - 3 - 4 = 9.", "16 - 3 - 4 = 9."),
        ("#### 18 kwa siku 7", "18"),
        ("#### B", "B"),
        ("<think>5</think>#### 18", "18"),
        (r"#### 18 \boxed{", "18"),
    ],
)
def test_marker(text: str, expected: str) -> None:
    found = extract_answer(text)
    assert found is not None
    assert (found.value, found.method) == (expected, "marker")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She ate 3 of 21, so 18.", "18"),
        ("3 + 15 = 18 eggs, -2", "-2"),
        ("Page 5\n100", "100"),
        ("makes ১৮ টাকা", "18"),
        ("about 5 million", "5 million"),
        ("it costs 1,000 in 2020", "2020"),
        ("<think>7</think>so 18", "18"),
        (r"<think>maybe \boxed{5}, no</think> so 18", "18"),
        ("<think>#### 5</think> so 18", "18"),
        ("The answer is not 5. It is 18.", "18"),
        ("<think>the total is 18", "18"),
        ("\\boxed{} 18", "18"),
    ],
)
def test_last_number(text: str, expected: str) -> None:
    found = extract_answer(text)
    assert found is not None
    assert (found.value, found.method) == (expected, "last_number")


def test_methods_can_be_left_out() -> None:
    text = "\\boxed{}\n#### 18\nThat took 7 steps."
    assert extract_answer(text, ("boxed",)) is None
    assert extract_answer(text, ("boxed", "last_number")).value == "7"
    assert extract_answer(text).method == "marker"
    assert reward("so 18", "18") == 1.0
    assert reward("so 18", "18", ("boxed",)) == 0.0


@pytest.mark.parametrize("text", ["", "no idea", r"\boxed{}", r"\boxed{", "####", "the answer is clear"])
def test_nothing_to_extract(text: str) -> None:
    assert extract_answer(text) is None
    assert reward(text, "18") == 0.0


@pytest.mark.parametrize(
    "text",
    ["18", "18.0", "18.00", " 18 ", "18.", "$18", r"\$18", "$18$", "18$", r"\(18\)", "x=18", "x = 18", "18 = x",
     "18 dollars", "18 dola", r"18\text{ dola}", r"18\%", "18%", "18 %", "٪18", "USD 18", "US$18", "KSh18", "Rs.18",
     "€18", "18€", "18 €", "₦18", "18 元", "18元", "18個", "18円", "18 টাকা", "18 డాలర్లు", "18 บาท", "18 ብር", "+18",
     "`18`", r"\pounds 18", r"\euro{}18", r"\underline{18}", r"18 \text{ cm}^2",
     "Jibu: 18", "The answer is 18.", "**18**", r"\textbf{18}", r"\mathrm{18}", r"\boxed{18}", "16 + 2 = 18",
     "36/2", r"\frac{36}{2}", r"\dfrac{36}{2}", "1.8e1", r"1.8 \times 10^{1}", "1.8 × 10¹", "18 m²", "18 m^2",
     "18 km/h", "18-mile", "18 a day", r"18^{\circ}", "\u200f18\u200f", "18\u202f", "18 (eighteen)", "\"18\"",
     "১৮", "१८", "౧౮", "๑๘", "١٨", "۱۸", "１８", "＄１８", "𝟏𝟖", "߁߈", "꘡꘨", "፲፰", "፲፰ ብር", "十八", "十八元", "一十八",
     "壹拾捌"],
)  # fmt: skip
def test_these_are_all_eighteen(text: str) -> None:
    assert grade(text, "18")
    assert answer_key(text) == Fraction(18)


@pytest.mark.parametrize(
    "text",
    ["1000", "1,000", "1 000", "1\u00a0000", "1\u202f000", "1\u2009000", "1.000", "1'000", "1’000", "1{,}000",
     r"1\,000", r"1,\!000", "١٬٠٠٠", "١٠٠٠", "১,০০০", "１，０００", "1,000.00", "1.000,00", "1 000,00", "፲፻", "一千",
     "1千", "1e3", r"10^{3}", "1 thousand", "elfu 1", "$1,000", r"\$1{,}000", "1.000 €", "1 হাজার"],
)  # fmt: skip
def test_these_are_all_a_thousand(text: str) -> None:
    assert grade(text, "1000")
    assert grade(text, "1,000")
    assert answer_key(text) == Fraction(1000)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-5", "-5"), ("−5", "-5"), ("–5", "-5"), ("－5", "-5"), ("-$5", "-5"), ("$-5", "-5"), ("x = -5", "-5"),
        ("3.5", "7/2"), ("3,5", "7/2"), ("٣٫٥", "7/2"), ("3½", "7/2"), ("½", "1/2"), (r"3\frac{1}{2}", "7/2"),
        ("3 1/2", "7/2"), (r"-\frac{1}{2}", "-1/2"), (r"\frac{-1}{2}", "-1/2"),
        (r"\frac{1}{-2}", "-1/2"), (r"\frac12", "1/2"), (".5", "1/2"),
        ("0.125", "1/8"), ("0,125", "1/8"), ("1,00,000", "100000"), ("12,34,567", "1234567"), ("1.234.567", "1234567"),
        ("1,234,567.5", "2469135/2"), ("1.234.567,5", "2469135/2"), ("12 345 678", "12345678"), ("2.125", "17/8"),
        ("10.50", "21/2"), ("1e-2", "1/100"), ("7万", "70000"), ("5 million", "5000000"), ("1.5 lakh", "150000"),
        ("3 hundred thousand", "300000"), ("5 ล้านบาท", "5000000"), ("፻", "100"), ("፪፻፶", "250"), ("፲፼", "100000"),
        ("፩፼፪፻", "10200"), ("三百零五", "305"), ("二〇二四", "2024"), ("两万", "20000"), ("一万零五十", "10050"),
        ("三亿二千万", "320000000"), ("零", "0"), ("0.333", "333/1000"),
    ],
)  # fmt: skip
def test_values(text: str, expected: str) -> None:
    assert value(text) == Fraction(expected)


@pytest.mark.parametrize(
    "text",
    ["", "none", "two", r"2\sqrt{3}", r"5\pi", "5π", "5x", "2ab", "5!", "x + 18", "18 + x", "x - 18", "18 - 20",
     "10-15", "3:30", "1/0", "3 and 4", "a = 3, b = 4", "x <= 5", "x >= 5", "(3, 4)", "(3,4)", "{1, 2}", r"\{1, 2\}",
     "x^2", "2^5", "5i", "18‰", "1,000,0", "1.00.00", "3/4/2020", "2 3/2", "H2O", "1e999999999", "9" * 400, "፩፰", "፻፻",
     "一百五", "百五", "一万五", "三角形", "一共", "\\boxed{"],
)  # fmt: skip
def test_no_plain_number(text: str) -> None:
    assert readings(text) == ()


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [("19", "18"), ("18.0001", "18"), ("1.8", "18"), ("180", "18"), ("-18", "18"), ("18", "-18"), ("1/3", "0.3333"),
     ("0.33", "1/3"), ("1,000", "1"), ("18 million", "18"), ("1000.5", "1000"), (r"\sqrt{18}", "18"),
     ("18 thousand", "18"), (None, "18"), ("", "18"), ("2", r"2\sqrt{3}"), ("5", r"5\pi"), ("no answer", "18"),
     ("3,4", "34"), ("10", "10-15"), ("9007199254740993", "9007199254740992"),
     ("0.1", "0.1000000000000000055511151231257827")],
)  # fmt: skip
def test_wrong_answers_stay_wrong(prediction: str | None, reference: str) -> None:
    assert not grade(prediction, reference)


def test_two_readings_are_settled_by_the_reference() -> None:
    assert readings("2.125") == (Fraction(17, 8), Fraction(2125))
    assert grade("2.125", "2125")
    assert grade("2.125", "2.125")
    assert not grade("2125", "2.125")
    assert grade("1.000", "1")
    assert grade("3,125", "3.125")
    assert not grade("3,000", "3")


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        (r"2\sqrt{3}", r"$2\sqrt{3}$", True),
        (r"\left(3, 4\right)", "(3,4)", True),
        ("x^2 + 1", "x^2+1", True),
        ("1+x^2", "x^2+1", False),
        ("Monday", "monday.", True),
        (r"\text{Monday}", "Monday", True),
        ("Tuesday", "Monday", False),
        (r"\dfrac{\pi}{4}", r"\frac{\pi}{4}", True),
        ("$", "$", False),
    ],
)
def test_text_answers_are_compared_as_text(prediction: str, reference: str, right: bool) -> None:
    assert grade(prediction, reference) is right


def test_every_decimal_script_of_unicode() -> None:
    zeros = [c for c in map(chr, range(0x20000)) if unicodedata.category(c) == "Nd" and unicodedata.decimal(c) == 0]
    assert len(zeros) > 60
    for zero in zeros:
        number = "".join(chr(ord(zero) + digit) for digit in (2, 0, 9))
        assert value(number) == 209, unicodedata.name(zero)
        assert extract_answer(f"a {number} b").value == "209"


def test_a_problem_without_an_answer_is_an_error() -> None:
    for reference in (None, "", "  "):
        with pytest.raises(UserError, match="cannot be graded"):
            reward("18", reference)


@pytest.mark.parametrize(
    "unit", ["\\boxed{", "{", "####", "#### a\n", "1 ", "1,", "-", "፼", "x=", "\\text{", "5/", "**"]
)
def test_degenerate_repetition_costs_no_time(unit: str) -> None:
    start = time.process_time()  # others' work on the machine is no time of ours
    extract_answer(unit * (40_000 // len(unit)))
    readings(unit * 100)
    assert time.process_time() - start < 5


def test_gsm8k_solutions_grade_right_against_their_own_answer() -> None:
    path = PUBLIC_DATA / "gsm8k" / "test.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    solutions = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(solutions) == 1319
    for solution in solutions:
        answer = solution.rpartition("####")[2].strip()
        found = extract_answer(solution)
        assert found.method == "marker"
        assert found.value == answer
        assert grade(found.value, answer.replace(",", ""))
        assert not grade(found.value, str(int(answer.replace(",", "")) + 1))
