"""Measurements as lines of a CSV file, which is added to and never rewritten."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from copsd_tools.command_line.arguments import path as path_type
from copsd_tools.command_line.outputs import check_file_and_parents
from megatron_copsd.errors import UserError, describe
from megatron_copsd.records.disk import appending, writing

_AGAIN = "start the same command again"

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from copsd_tools.bench.provenance import Provenance


def add_csv_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--csv``, the file that a benchmark's lines are added to: ``args.csv``, a path or None."""
    parser.add_argument("--csv", type=path_type, help="append the numbers to this file")


def check_csv(file: Path | None, *kinds: type[DataclassInstance]) -> None:
    """See before the work that a file can be added to, where the option names one.

    Args:
        file: of ``--csv``.
        kinds: dataclasses that a line is made of, in order.

    Raises:
        UserError: the file can't be written, or has other columns.
    """
    if file is None:
        return
    check_file_and_parents(file, "--csv")
    if file.exists() and file.stat().st_size:
        check_heading(file, [field.name for kind in kinds for field in fields(kind)])


def append_lines(path: Path, lines: Sequence[DataclassInstance], source: Provenance) -> None:
    """Add lines, dataclasses of numbers and words, each with where it comes from.

    Raises:
        UserError: the file has other columns.
    """
    columns = [field.name for part in (lines[0], source) for field in fields(part)]
    rows = ([getattr(part, field.name) for part in (line, source) for field in fields(part)] for line in lines)
    append_rows(path, columns, rows)


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Add rows to a file, which is made with a heading if it is new or empty.

    Raises:
        UserError: the file has other columns, or the disk refuses the rows; it ends as it did then.
    """
    with writing(path, _AGAIN):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    size = path.stat().st_size
    if size:
        check_heading(path, columns)
    with appending(path, _AGAIN) as file:
        csv.writer(file).writerows(rows if size else [columns, *rows])


def check_heading(path: Path, columns: Sequence[str]) -> None:
    """See that a file is one of ours.

    Raises:
        UserError: it has other columns.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            found = next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(describe(str(path), path.name, f"is no CSV file ({error})", "Move it away.")) from error
    if found != list(columns):
        rule = "the file has other columns than this command writes"
        raise UserError(describe(str(path), ",".join(found), rule, "Move it away."))
