"""Measurements in a CSV file, one line each with its case and where it comes from; read back by the next run."""

from __future__ import annotations

import csv
import importlib.metadata
import platform
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import torch

from copsd_tools.bench.cases import Case
from copsd_tools.bench.measure import Measurement
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
class Provenance:
    """Where a measurement comes from.

    Attributes:
        device_name: name of the GPU or CPU.
        commit: ``git describe --always --dirty`` of the code.
        torch, triton, liger_kernel, cut_cross_entropy: versions; empty where not installed.
        date: day, UTC.
        command: the command line.
    """

    device_name: str
    commit: str
    torch: str
    triton: str
    liger_kernel: str
    cut_cross_entropy: str
    date: str
    command: str


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


def here(device: str, arguments: Sequence[str]) -> Provenance:
    """Provenance of what this process measures; ``arguments`` are those of ``copsd bench``."""
    return Provenance(
        device_name=device_name(device),
        commit=_commit(),
        torch=torch.__version__,
        triton=_version("triton"),
        liger_kernel=_version("liger-kernel"),
        cut_cross_entropy=_version("cut-cross-entropy"),
        date=datetime.now(UTC).date().isoformat(),
        command=shlex.join(["copsd", "bench", *arguments]),
    )


def device_name(device: str) -> str:
    """Name of the GPU or CPU that measures."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def append(path: Path, results: Sequence[Result]) -> None:
    """Add lines to the file, made with a heading if it is new.

    Raises:
        UserError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        _check_heading(path)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(_columns())
        for result in results:
            parts = (result.case, result.case.spec, result.measurement, result.provenance)
            writer.writerow(getattr(part, name) for part in parts for name in _names(type(part)))


def read(path: Path) -> list[Result]:
    """All lines of the file; none where there is no file.

    Raises:
        UserError: the file has other columns, or a value that is none of its column's.
    """
    if not path.exists():
        return []
    _check_heading(path)
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


def _check_heading(path: Path) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        found = next(csv.reader(file), [])
    if found != _columns():
        raise UserError(
            describe(str(path), ",".join(found), "the file has other columns than this command writes", "Move it away.")
        )


def _columns() -> list[str]:
    return [name for kind in (Case, DivergenceSpec, Measurement, Provenance) for name in _names(kind)]


def _names(kind: type) -> list[str]:
    """Columns that a dataclass fills; the spec of a case fills its own."""
    return [field.name for field in fields(kind) if field.name != "spec"]


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
