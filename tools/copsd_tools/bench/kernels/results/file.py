"""Measurements in a CSV file, one line each with its case and where it comes from; read back by the next run."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from copsd_tools.bench.csv_lines import append_rows, check_heading
from copsd_tools.bench.kernels.cases import Case
from copsd_tools.bench.kernels.measuring.measure import Measurement
from copsd_tools.bench.provenance import Provenance
from megatron_copsd.errors import UserError, describe
from megatron_copsd.loss.divergence import DivergenceSpec

_PARSERS: dict[str, Callable[[str], object]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": {"True": True, "False": False}.__getitem__,
    "DivergenceKind": str,
    "What": str,
    "int | None": lambda text: int(text) if text else None,
    "float | None": lambda text: float(text) if text else None,
}


@dataclass(frozen=True)
class Result:
    """One line of the file."""

    case: Case
    measurement: Measurement
    provenance: Provenance

    @property
    def failed(self) -> bool:
        """Whether there is a reason in place of numbers."""
        return self.measurement.median_ms is None


def append(path: Path, results: Sequence[Result]) -> None:
    """Add lines to the file, made with a heading if it is new.

    Raises:
        UserError: the file has other columns.
    """
    rows = (
        [getattr(part, name) for part in parts for name in _names(type(part))]
        for parts in ((result.case, result.case.spec, result.measurement, result.provenance) for result in results)
    )
    append_rows(path, _columns(), rows)


def read(path: Path) -> list[Result]:
    """All lines of the file; none where there is no file.

    Raises:
        UserError: the file has other columns, or a value that is none of its column's.
    """
    if not path.exists():
        return []
    check_heading(path, _columns())
    with path.open(newline="", encoding="utf-8") as file:
        return [_parse(path, number, line) for number, line in enumerate(csv.DictReader(file), start=2)]


def _parse(path: Path, number: int, line: dict[str, str]) -> Result:
    def part(kind: type) -> dict[str, object]:
        types = {field.name: field.type for field in fields(kind)}
        return {name: _PARSERS[types[name]](line[name]) for name in _names(kind)}

    try:
        case = Case(**part(Case), spec=DivergenceSpec(**part(DivergenceSpec)))
        return Result(case, Measurement(**part(Measurement)), Provenance(**part(Provenance)))
    except (KeyError, TypeError, ValueError) as error:
        rule = f"a line that this command did not write ({error})"
        raise UserError(describe(f"{path}:{number}", line, rule, "Remove the line, or choose another file.")) from error


def _columns() -> list[str]:
    return [name for kind in (Case, DivergenceSpec, Measurement, Provenance) for name in _names(kind)]


def _names(kind: type) -> list[str]:
    """Columns that a dataclass fills; the spec of a case fills its own."""
    return [field.name for field in fields(kind) if field.name != "spec"]
