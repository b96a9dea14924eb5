"""Problems from files: four layouts, one kind of record."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from megatron_copsd.config.schema import DataSource
from megatron_copsd.data.rows import Row, read_json_lines, read_rows, read_tsv, require_file
from megatron_copsd.errors import UserError, describe
from megatron_copsd.grading.references import ungradable
from megatron_copsd.languages import Language, language
from megatron_copsd.types import Problem

Ungraded = Literal["keep", "drop", "error"]
# Makes the problem of a row, or returns the reason for which the row is dropped.
ToProblem = Callable[[Row], Problem | str]

_SHOWN = 40
_REASONS = 20
_NUMBER = re.compile(r"-?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]+)?")
_SOLUTION_END = re.compile(r"#### *(\S.*?)\s*$")
_STRAIGHT_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "`": "'", "\u201c": '"', "\u201d": '"'})


@dataclass(frozen=True)
class ProblemSet:
    """The problems of one source, and what was left out on the way.

    Attributes:
        path: the source's file or data set.
        language: code of the problems' language.
        problems: in the order of the file.
        rows: rows the file has.
        drops: number of rows left out, by reason; ``first`` and ``count`` are a choice and not counted here.
        repeated: problems that stand in an earlier row, word for word; kept.
        first_repeated: places of the first such row and of the one that it repeats; empty if there is none.
        caveat: what to know about the language's prompt texts, or None.
    """

    path: str
    language: str
    problems: tuple[Problem, ...]
    rows: int
    drops: Mapping[str, int]
    repeated: int
    first_repeated: tuple[str, ...]
    caveat: str | None

    def notes(self) -> tuple[str, ...]:
        """Return what the user should be told about this source, one line each."""
        lines = [f"{self.path}: {len(self.problems)} {self.language} problems of {self.rows} rows"]
        lines += [f"{self.path}: {dropped}" for dropped in _drop_notes(self.drops)]
        if self.repeated:
            row, earlier = self.first_repeated
            lines.append(
                f"{self.path}: {self.repeated} problems repeat an earlier row, such as {row} that of {earlier}"
            )
        if self.caveat is not None:
            lines.append(f"{self.path}: {self.caveat}")
        return tuple(lines)


def load_problems(source: DataSource, where: str, ungraded: Ungraded = "keep") -> ProblemSet:
    """Read the problems of one source.

    ``first`` and ``count`` choose among the rows in the source's language, before rows are dropped for any other
    reason, so that neighbouring ranges of one file never share a problem.

    Args:
        source: the file or data set and its layout; relative paths start at the current directory.
        where: the setting that holds ``source``, e.g. ``data.train.0``, for errors.
        ungraded: what happens to a row without an answer that responses can be graded against; ``keep`` where none are.

    Returns:
        The problems and the counts of dropped rows.

    Raises:
        UserError: a setting does not fit the layout, a file is missing, a row is malformed, or nothing is left.
    """
    target = language(source.language, f"{where}.language")
    if source.layout != "parallel":
        for name in ("english", "solutions"):
            if getattr(source, name) is not None:
                rule = f"the {source.layout} layout has everything in one file"
                raise UserError(describe(f"{where}.{name}", getattr(source, name), rule, "Remove the setting."))
    drops: Counter[str] = Counter()
    if source.layout == "reference":
        rows = own = read_rows(source, where)
        to_problem = _reference(source, target)
    elif source.layout == "released":
        rows = read_rows(source, where)
        own = _rows_in(target, rows, drops)
        to_problem = _released(target)
    elif source.layout == "subsets":
        rows = read_rows(source, where)
        own = _subset_rows(source, target, rows, where, drops)
        to_problem = _variant
    else:
        rows = own = _read_pairs(source.path, f"{where}.path")
        to_problem = _parallel(source, target, rows, where)

    problems = []
    stated: dict[tuple[str | None, ...], str] = {}
    repeats: list[tuple[str, ...]] = []
    for row in _window(own, source, where):
        problem = to_problem(row)
        if isinstance(problem, Problem) and ungraded != "keep" and (reason := ungradable(problem.answer)):
            if ungraded == "error":
                remedy = "Give it one, remove the row, or set data.ungradable: drop."
                raise row.error(problem.answer, f"{reason}, and responses are graded against it", remedy)
            problem = reason
        if isinstance(problem, str):
            drops[problem] += 1
            continue
        # A subset's rows share questions: there it is the pair that may not come twice.
        words = (problem.problem, problem.problem_en, problem.solution if problem.subset else None)
        earlier = stated.setdefault(words, row.where)
        if earlier != row.where:
            repeats.append((row.where, earlier))
        problems.append(problem)
    if not problems:
        reasons = "; ".join(_drop_notes(drops))
        rule = f"no {target.code} problem is left of {len(rows)} rows ({reasons or 'the file is empty'})"
        raise UserError(describe(f"{where}.path", source.path, rule, "Check path, split, layout and language."))
    return ProblemSet(
        path=source.path,
        language=target.code,
        problems=tuple(problems),
        rows=len(rows),
        drops=dict(drops),
        repeated=len(repeats),
        first_repeated=repeats[0] if repeats else (),
        caveat=target.caveat,
    )


def _drop_notes(drops: Mapping[str, int]) -> list[str]:
    """What was dropped, a line for each reason; of very many reasons, the first ones."""
    notes = [f"{count} rows dropped: {reason}" for reason, count in sorted(drops.items())]
    return notes if len(notes) <= _REASONS else [*notes[:_REASONS], f"{len(notes) - _REASONS} more reasons"]


def _window(rows: list[Row], source: DataSource, where: str) -> list[Row]:
    wanted = source.first + (source.count or 1)
    if rows and wanted > len(rows):
        name, value = ("first", source.first) if source.count is None else ("count", source.count)
        rule = f"{source.path} has {len(rows)} rows in this language and first + count reaches {wanted}"
        raise UserError(describe(f"{where}.{name}", value, rule, "Lower first or count."))
    return rows[source.first : None if source.count is None else wanted]


def _reference(source: DataSource, target: Language) -> ToProblem:
    """The layout the reference implementation reads: problem (English), solution, problem_<lang>, problem_<lang>_ok."""
    codes = dict.fromkeys(code.lower() for code in (source.language, target.code, *target.aliases))
    columns = [f"problem_{code}" for code in codes]

    def to_problem(row: Row) -> Problem | str:
        column = "problem" if target.code == "EN" else _only(row, columns) or columns[0]
        ok = row.fields.get(f"{column}_ok", True)
        if target.code != "EN" and ok is not True:
            if ok is not False and ok is not None:
                raise row.error(ok, f"{column}_ok must be true or false", "Write it so, or leave it out.")
            return f"{column}_ok is not true"
        answer_column = _only(row, ["Answer", "answer"])
        answer = row.answer(answer_column) if answer_column else None
        return Problem(row.id, target.code, row.text(column), row.text("problem"), row.text("solution"), answer)

    return to_problem


def _only(row: Row, columns: list[str]) -> str | None:
    """Return the one column of several names for the same that a row has; None if it has none."""
    found = [name for name in columns if name in row.fields]
    if len(found) > 1:
        raise row.error(", ".join(found), "several columns for the same", "Keep one of them.")
    return found[0] if found else None


def _rows_in(target: Language, rows: list[Row], drops: Counter[str]) -> list[Row]:
    own = []
    for row in rows:
        short = row.text("language_short")
        if short.lower() in {code.lower() for code in (target.code, *target.aliases)}:
            own.append(row)
        else:
            drops[f"language_short is {short[:_SHOWN]}"] += 1
    return own


def _released(target: Language) -> ToProblem:
    """The layout of the published data: problem (English), problem_translated, solution, Answer, language_short."""
    column = "problem" if target.code == "EN" else "problem_translated"

    def to_problem(row: Row) -> Problem:
        answer = row.answer("Answer")
        return Problem(row.id, target.code, row.text(column), row.text("problem"), row.text("solution"), answer)

    return to_problem


def _subset_rows(source: DataSource, target: Language, rows: list[Row], where: str, drops: Counter[str]) -> list[Row]:
    """Rows that were made for a language, of the subsets that are asked for."""
    targets = [language(row.text("target"), row.where) for row in rows]
    drops.update(f"they are for {made.code}" for made in targets if made is not target)
    own = [row for row, made in zip(rows, targets, strict=True) if made is target]
    there = dict.fromkeys(row.text("subset") for row in own)
    for name in source.subsets or ():
        if name not in there:
            rule = f"{source.path} has no such subset for {target.code} (it has {', '.join(there) or 'no row'})"
            raise UserError(describe(f"{where}.subsets", name, rule, "Correct the name, or build it."))
    return [row for row in own if source.subsets is None or row.text("subset") in source.subsets]


def _variant(row: Row) -> Problem:
    """The layout of ``copsd sdrrl build``: subset, group, target, language, problem, solution, verbatim."""
    verbatim = row.fields.get("verbatim", False)
    if not isinstance(verbatim, bool):
        raise row.error(verbatim, "verbatim must be true or false", "Write it so, or leave it out.")
    own = language(row.text("language"), row.where)
    return Problem(
        row.id, own.code, row.text("problem"), solution=row.text("solution"), subset=row.text("subset"),
        group=row.text("group"), verbatim=verbatim,
    )  # fmt: skip


def _parallel(source: DataSource, target: Language, rows: list[Row], where: str) -> ToProblem:
    """Question-and-answer lists of one benchmark in several languages (MGSM), with worked solutions (GSM8K)."""
    english = rows if target.code == "EN" else None
    if source.english is not None:
        if target.code == "EN":
            rule = "the problems are English already"
            raise UserError(describe(f"{where}.english", source.english, rule, "Remove the setting."))
        english = _read_pairs(source.english, f"{where}.english")
        if len(english) != len(rows):
            rule = f"it has {len(english)} rows and {source.path} has {len(rows)}, so rows cannot be aligned"
            raise UserError(describe(f"{where}.english", source.english, rule, "Give the file of the same rows."))
    solutions = None
    if source.solutions is not None:
        if english is None:
            rule = "solutions are aligned through the English questions, and english is not set"
            raise UserError(describe(f"{where}.solutions", source.solutions, rule, "Set english too."))
        require_file(source.solutions, f"{where}.solutions")
        solutions = read_json_lines(source.solutions)
        if len(solutions) < len(rows):
            rule = f"it has {len(solutions)} rows and {source.path} has {len(rows)}, so rows cannot be aligned"
            raise UserError(describe(f"{where}.solutions", source.solutions, rule, "Give the file of the same rows."))

    def to_problem(row: Row) -> Problem:
        index = row.number - 1
        question, answer = row.text("question"), row.text("answer")
        number = _number(row, answer)
        problem_en = solution = None
        if english is not None:
            problem_en = english[index].text("question")
            _require_same_answer(english[index], english[index].text("answer"), row, number)
        if solutions is not None:
            assert english is not None
            solution = _aligned_solution(solutions[index], english[index], row, number)
        return Problem(row.id, target.code, question, problem_en, solution, answer)

    return to_problem


def _read_pairs(path: str, where: str) -> list[Row]:
    require_file(path, where)
    return read_tsv(path, ("question", "answer"))


def _aligned_solution(solution: Row, english: Row, row: Row, number: Decimal) -> str:
    """The worked solution of a row, once question and answer show that it is this row's."""
    if _loose(solution.text("question")) != _loose(english.text("question")):
        rule = f"this is not the question of {english.where}, so rows are not aligned"
        raise solution.error(solution.text("question"), rule, "Give files whose i-th rows are the same problem.")
    text = solution.text("answer")
    end = _SOLUTION_END.search(text)
    if end is None:
        raise solution.error(text[-40:], "the solution does not end with '#### answer'", "Add its last line.")
    _require_same_answer(solution, end[1], row, number)
    return text


def _require_same_answer(other: Row, answer: str, row: Row, number: Decimal) -> None:
    if _number(other, answer) != number:
        rule = f"the answer differs from {number} of {row.where}, so rows are not aligned"
        raise other.error(answer, rule, "Give files whose i-th rows are the same problem.")


def _number(row: Row, answer: str) -> Decimal:
    if _NUMBER.fullmatch(answer) is None:
        raise row.error(answer, "the answer is not a number", "Write digits, e.g. 18, 1,250 or -0.5.")
    return Decimal(answer.replace(",", ""))


def _loose(question: str) -> str:
    """A question without what copies of it differ in: white space and the shape of quotes."""
    return "".join(question.translate(_STRAIGHT_QUOTES).split())
