"""Rows of a file or hub data set as plain fields, each with the place it was read from.

Local JSON is parsed here rather than by ``datasets``, whose JSON reader infers types over the whole column: a column of
dates comes back as timestamps, a column that mixes ``"3"`` and ``3`` as integers, and a bad line has no number.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from megatron_copsd.config.paths import why_no_file
from megatron_copsd.config.schema import DataSource
from megatron_copsd.errors import UserError, describe

_SHOWN = 80
_MOST_DIGITS = 300


@dataclass(frozen=True)
class Row:
    """One row as the file states it.

    Attributes:
        where: ``file:line``, or ``file row n`` where rows are not lines; for error messages.
        id: ``file name:n``, the same wherever the file lies.
        number: position in the file, from 1.
        fields: values by column.
    """

    where: str
    id: str
    number: int
    fields: Mapping[str, object]

    def text(self, column: str) -> str:
        """Return the text of a column without surrounding white space.

        Raises:
            UserError: the column is missing, or its value is not a text, is empty or cannot be written as UTF-8.
        """
        value = self._value(column)
        if not isinstance(value, str):
            raise self.error(value, f"{column} must be a text", "Write it as a string, or remove the row.")
        if not value.strip():
            raise self.error(value, f"{column} is empty", "Fill it in, or remove the row.")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            rule = f"{column} has half a surrogate pair, which is no character"
            raise self.error(value, rule, "Write the character itself, or remove the row.") from error
        if "\0" in value:
            raise self.error(value, f"{column} has a zero byte", "Remove it, or remove the row.")
        return value.strip()

    def answer(self, column: str) -> str | None:
        """Return the answer of a column as text; None where it is null or empty, as for problems that ask for a proof.

        Raises:
            UserError: the column is missing, or its value is neither a text nor a finite number.
        """
        value = self._value(column)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise self.error(value, f"{column} is no finite number", "Write null where there is no answer.")
            return str(value)
        return self.text(column)

    def _value(self, column: str) -> object:
        if column not in self.fields:
            remedy = f"Columns found: {', '.join(map(repr, self.fields))}."
            raise UserError(describe(self.where, column, "the row lacks this column", remedy))
        return self.fields[column]

    def error(self, value: object, rule: str, remedy: str) -> UserError:
        """Build the error that names this row; a long value is shown by its beginning."""
        if isinstance(value, str) and len(value) > _SHOWN:
            value = value[:_SHOWN] + "..."
        return UserError(describe(self.where, value, rule, remedy))


def read_rows(source: DataSource, where: str) -> list[Row]:
    """Read all rows of a JSON, JSONL or Parquet file, a local data set folder, or a hub data set.

    Args:
        source: where the rows are; a relative path starts at the current directory.
        where: the setting that holds ``source``, for errors.

    Raises:
        UserError: the source cannot be found or read, or a line is malformed.
    """
    path = Path(source.path)
    read = {".json": _json_rows, ".jsonl": _json_rows, ".parquet": _parquet_rows}.get(path.suffix.lower())
    if read is None and (os.path.isdir(path) or not os.path.lexists(path)):
        return _dataset_rows(source, where)
    require_file(source.path, f"{where}.path")
    if read is None:
        rule = f"the {source.layout} layout reads .json, .jsonl and .parquet files"
        raise UserError(describe(f"{where}.path", source.path, rule, "Convert the file, or rename it."))
    if source.split != "train":
        rule = "a file has no splits; split is for hub data sets"
        raise UserError(describe(f"{where}.split", source.split, rule, "Remove the setting."))
    return read(source.path)


def require_file(path: str, where: str) -> None:
    """Refuse a path that is not a file which can be read.

    Raises:
        UserError: nothing is there, or something else.
    """
    if rule := why_no_file(path):
        rule += f" (relative paths start at {Path.cwd()})"
        raise UserError(describe(where, path, rule, "Correct the path."))


def read_json_lines(path: str) -> list[Row]:
    """Read one JSON object a line; empty lines are passed over.

    Raises:
        UserError: a line is not UTF-8, not JSON or not an object.
    """
    return _json_line_rows(path, _read_text(path))


def read_tsv(path: str, columns: tuple[str, ...]) -> list[Row]:
    """Read a tab-separated file without header or quoting.

    Args:
        path: the file.
        columns: names of the columns, in order.

    Raises:
        UserError: a line is not UTF-8 or has another number of columns.
    """
    rows = []
    lines = _read_text(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, start=1):
        values = line.removesuffix("\r").split("\t")
        row = Row(f"{path}:{number}", _row_id(path, number), number, dict(zip(columns, values, strict=False)))
        if len(values) != len(columns):
            rule = f"the line has {len(values)} tab-separated columns, not {len(columns)} ({', '.join(columns)})"
            raise row.error(line, rule, "Correct the line.")
        rows.append(row)
    return rows


def _row_id(path: str, number: int) -> str:
    return f"{Path(path).name}:{number}"


def _read_text(path: str) -> str:
    data = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        rule = f"the file is not UTF-8 ({error.reason})"
        value = data[error.start : error.end]
        raise UserError(describe(f"{path}:{line}", value, rule, "Save the file as UTF-8.")) from error


class _RefusedValue(ValueError):
    """JSON that is well-formed, or that Python takes for it, and whose meaning another reader may take otherwise."""


def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise _RefusedValue(f"the key {key[:_SHOWN]!r} stands twice in an object", "Keep one of the two.")
    return found


def _no_number(text: str) -> object:
    raise _RefusedValue(f"{text} is no number that JSON has", "Write null where there is no value.")


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise _RefusedValue(f"a number of {len(text):,} digits", "Write it as a text, or remove the row.")
    return int(text)


def _decimal(text: str) -> Decimal:
    """Keep a number as it is written: 0.10 and 12345678901234567.89 are no floats."""
    if len(text) > _MOST_DIGITS or not math.isfinite(float(text)):
        raise _RefusedValue(f"the number {text[:_SHOWN]} is too large or too long", "Write null, or remove the row.")
    return Decimal(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_no_number, parse_int=_whole, parse_float=_decimal)
_SPACE = re.compile(r"[ \t\r\n]*")


def _decode(text: str, at: int, where: str) -> tuple[object, int]:
    """Read the JSON value at a position; returns it and the position behind it.

    Raises:
        UserError: naming ``where`` for what is refused, as the position inside of it is not known.
        json.JSONDecodeError: the text is not JSON.
    """
    try:
        value, end = _DECODER.raw_decode(text, at)
    except _RefusedValue as error:
        rule, remedy = error.args
        raise UserError(describe(where, text[at : at + _SHOWN], rule, remedy)) from error
    except RecursionError as error:
        remedy = "Write each problem as {column: value}."
        raise UserError(describe(where, text[at : at + _SHOWN], "values lie too deep in each other", remedy)) from error
    return value, end


def _json_rows(path: str) -> list[Row]:
    text = _read_text(path)
    if not text.lstrip().startswith("["):
        return _json_line_rows(path, text)
    try:
        rows = enumerate(_array_items(path, text), start=1)
        return [_object_row(where, _row_id(path, number), number, item) for number, (where, item) in rows]
    except json.JSONDecodeError as error:
        raise _not_json(f"{path}:{error.lineno}", text.split("\n")[error.lineno - 1], error) from error


def _array_items(path: str, text: str) -> Iterator[tuple[str, object]]:
    """Yield the items of a JSON array, each with the ``file:line`` that it begins at."""

    def behind_space(at: int) -> int:
        found = _SPACE.match(text, at)
        assert found
        return found.end()

    at, line, counted = behind_space(text.index("[") + 1), 1, 0
    closed = text[at : at + 1] == "]"
    while not closed:
        line, counted = line + text.count("\n", counted, at), at
        item, at = _decode(text, at, f"{path}:{line}")
        yield f"{path}:{line}", item
        at = behind_space(at)
        closed = text[at : at + 1] == "]"
        if not closed:
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = behind_space(at + 1)
    if rest := text[at + 1 :].strip():
        raise json.JSONDecodeError("Extra data", text, text.index(rest, at + 1))


def _json_line_rows(path: str, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            start = len(line) - len(line.lstrip())
            item, end = _decode(line, start, where)
            if line[end:].strip():
                raise json.JSONDecodeError("Extra data", line, end)
        except json.JSONDecodeError as error:
            raise _not_json(where, line, error) from error
        rows.append(_object_row(where, _row_id(path, number), number, item))
    return rows


def _not_json(where: str, line: str, error: json.JSONDecodeError) -> UserError:
    remedy = "Write one object a line (.jsonl), or one array of objects (.json)."
    return UserError(describe(where, line[:_SHOWN], f"not JSON ({error.msg}, column {error.colno})", remedy))


def _object_row(where: str, row_id: str, number: int, item: object) -> Row:
    if not isinstance(item, dict):
        remedy = "Write each problem as {column: value}."
        raise UserError(describe(where, str(item)[:_SHOWN], "a row must be a JSON object", remedy))
    return Row(where, row_id, number, item)


def _parquet_rows(path: str) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path, page_checksum_verification=True).read()
        items = table.to_pylist()
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise UserError(describe(path, str(error), "not a readable Parquet file", "Write the file again.")) from error
    twice = [name for name, count in Counter(table.column_names).items() if count > 1]
    if twice:
        raise UserError(describe(path, twice[0], "two columns have this name", "Keep one of the two."))
    return [Row(f"{path} row {n}", _row_id(path, n), n, item) for n, item in enumerate(items, start=1)]


def _dataset_rows(source: DataSource, where: str) -> list[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path = source.path
    if not os.path.isdir(path) and re.fullmatch(r"[\w.-]+/[\w.-]+", path) is None:
        rule = f"neither a file (relative paths start at {Path.cwd()}) nor a hub name such as owner/name"
        raise UserError(describe(f"{where}.path", path, rule, "Correct the path."))
    try:
        dataset = load_dataset(path, split=source.split)
    except (DatasetsError, OSError, ValueError) as error:
        rule = f"split {source.split!r} of this data set cannot be loaded ({error})"
        remedy = "Correct path or split; on a machine without a network, give a folder that holds the data set."
        raise UserError(describe(f"{where}.path", path, rule, remedy)) from error
    name = f"{Path(path).name}[{source.split}]"
    return [Row(f"{path}[{source.split}] row {n}", f"{name}:{n}", n, item) for n, item in enumerate(dataset, start=1)]
