"""The cases that docs/grading.md works through, and that rewards and evaluation take the same answer from them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_copsd.evaluate.metrics import accuracy_report
from megatron_copsd.grading.answers import extract_answer, reward

DOCUMENT = Path(__file__).parents[2] / "docs" / "grading.md"
ROWS = re.findall(r"^\| `([^`]+)` \| (\S+) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
CASES = [(response.replace("⏎", "\n"), None if answer == "none" else answer) for response, answer in ROWS]


def test_the_table_is_read() -> None:
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    assert len(CASES) == sum(line.startswith("| `") for line in lines) > 100


@pytest.mark.parametrize(("response", "answer"), CASES)
def test_worked_case(response: str, answer: str | None) -> None:
    if answer is None:
        assert extract_answer(response) is None
        return
    other = answer.removeprefix("-") if answer.startswith("-") else f"-{answer}"
    for text in (response, f"Step 1 is 7 + 4.\n\n{response}", f"<think>5</think> {response}"):
        assert reward(text, answer) == 1.0
        assert reward(text, other) == 0.0
        assert accuracy_report([[text]], [answer]).accuracy == 1.0
