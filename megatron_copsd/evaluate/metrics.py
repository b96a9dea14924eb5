"""Accuracy over sampled answers, reported so that no two conventions are confused.

``accuracy`` (avg@n), ``pass@n`` and ``maj@n`` are different numbers; papers of this field quote any of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_copsd.errors import UserError, describe
from megatron_copsd.grading.answers import answer_key, extract_answer, grade

_Z95 = 1.959963984540054
# Thai, Lao, Burmese, Khmer, Japanese and Chinese.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


@dataclass(frozen=True)
class AccuracyReport:
    """Results over the problems of one source, each answered ``samples`` times; shares lie in [0, 1].

    Attributes:
        problems, samples: counts, at least 1.
        correct: number of right answers of each problem.
        majority: share of problems whose most frequent answer is right; answers that state the same number are one,
            ties go to the answer seen first, and a problem without any extracted answer is wrong.
        format_rate: share of responses whose answer stands in a box or behind a marker.
        repetition: mean share of 4-grams of words that repeat an earlier one of their response.
    """

    problems: int
    samples: int
    correct: tuple[int, ...]
    majority: float
    format_rate: float
    repetition: float

    @property
    def accuracy(self) -> float:
        """Share of right answers, avg@n."""
        return sum(self.correct) / (self.problems * self.samples)

    @property
    def any_correct(self) -> float:
        """Share of problems with at least one right answer, pass@n with k = n."""
        return sum(count > 0 for count in self.correct) / self.problems

    def pass_at(self, k: int) -> float:
        """Return the unbiased estimate of pass@k: 1 - C(n - c, k) / C(n, k), arXiv 2107.03374 equation 1."""
        assert 1 <= k <= self.samples
        total = math.comb(self.samples, k)
        return sum(1 - math.comb(self.samples - count, k) / total for count in self.correct) / self.problems

    def interval(self) -> tuple[float, float]:
        """Return the 95 % Wilson interval of ``accuracy``, counting problems: samples of one are not independent."""
        return wilson_interval(self.accuracy, self.problems)

    def numbers(self) -> dict[str, float]:
        """Return what metrics files hold."""
        low, high = self.interval()
        found = {
            "accuracy": self.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "format_rate": self.format_rate,
            "repetition": self.repetition,
        }
        if self.samples > 1:
            found |= {f"pass@{self.samples}": self.any_correct, f"maj@{self.samples}": self.majority}
        return found

    def summary(self) -> str:
        """Return one line for people."""
        low, high = (100 * bound for bound in self.interval())
        text = f"accuracy {100 * self.accuracy:.1f} % ({low:.1f}-{high:.1f}), format {100 * self.format_rate:.1f} %"
        if self.samples > 1:
            text += (
                f", pass@{self.samples} {100 * self.any_correct:.1f} %, maj@{self.samples} {100 * self.majority:.1f} %"
            )
        return f"{text}, {self.problems} problems"


def accuracy_report(texts: Sequence[Sequence[str]], answers: Sequence[str | None]) -> AccuracyReport:
    """Grade responses.

    Args:
        texts: responses of each problem, the same number for all.
        answers: right answer of each problem.

    Raises:
        UserError: there are no problems, or one has no answer.
    """
    if not texts:
        rule = "there is nothing to evaluate"
        raise UserError(describe("held-out problems", len(texts), rule, "Give at least one problem."))
    correct, majority, formatted, repetition = [], 0, 0, 0.0
    samples = len(texts[0])
    for number, (responses, answer) in enumerate(zip(texts, answers, strict=True), 1):
        assert len(responses) == samples
        if answer is None or not answer.strip():
            rule = "held-out problems need an answer to be graded against"
            raise UserError(describe(f"held-out problem {number}", answer, rule, "Drop the problems without one."))
        found = [extract_answer(response) for response in responses]
        correct.append(sum(one is not None and grade(one.value, answer) for one in found))
        votes: dict[Fraction | str, list[str]] = {}
        for one in found:
            if one is not None:
                votes.setdefault(answer_key(one.value), []).append(one.value)
        majority += bool(votes) and grade(max(votes.values(), key=len)[0], answer)
        formatted += sum(one is not None and one.method != "last_number" for one in found)
        repetition += sum(map(repetition_rate, responses))
    total = len(texts) * samples
    return AccuracyReport(
        problems=len(texts),
        samples=samples,
        correct=tuple(correct),
        majority=majority / len(texts),
        format_rate=formatted / total,
        repetition=repetition / total,
    )


def repetition_rate(text: str) -> float:
    """Return the share of a text's 4-grams of words that occurred before in it; 0 for fewer than 4 words.

    In scripts without spaces between words every character counts as one.
    """
    words = [part for word in text.split() for part in (word if _UNSPACED.search(word) else (word,))]
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % score interval of a share of ``count`` trials (Wilson, 1927)."""
    spread = _Z95**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = _Z95 / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)
