"""Rows of a file or hub data set as plain fields, each with the place it was read from.

Local JSON is parsed here rather than by ``datasets``, whose JSON reader infers types over the whole column: a column of
dates comes back as timestamps, a column that mixes ``"3"`` and ``3`` as integers, and a bad line has no number.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_copsd.config.schema import DataSource
from megatron_copsd.errors import UserError, describe

_SHOWN = 80


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
        return value.strip()

    def answer(self, column: str) -> str | None:
        """Return the answer of a column as text; None where it is null or empty, as for problems that ask for a proof.

        Raises:
            UserError: the column is missing, or its value is neither a text nor a number.
        """
        value = self._value(column)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
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
    if path.is_dir() or (read is None and not path.exists()):
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
    """Refuse a path that is not a file.

    Raises:
        UserError: nothing is there, or it is a folder.
    """
    if not Path(path).is_file():
        rule = f"no such file (relative paths start at {Path.cwd()})"
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


def _json_rows(path: str) -> list[Row]:
    text = _read_text(path)
    if not text.lstrip().startswith("["):
        return _json_line_rows(path, text)
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise _not_json(f"{path}:{error.lineno}", text.split("\n")[error.lineno - 1], error) from error
    rows = enumerate(items, start=1)
    return [_object_row(f"{path} row {number}", _row_id(path, number), number, item) for number, item in rows]


def _json_line_rows(path: str, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            item = json.loads(line)
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
    from datasets import load_dataset

    try:
        # Streaming reads the file itself: no copy in the cache that could go stale.
        items = list(load_dataset("parquet", data_files=path, split="train", streaming=True))
    except (OSError, ValueError) as error:
        raise UserError(describe(path, str(error), "not a readable Parquet file", "Write the file again.")) from error
    return [Row(f"{path} row {n}", _row_id(path, n), n, item) for n, item in enumerate(items, start=1)]


def _dataset_rows(source: DataSource, where: str) -> list[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path = source.path
    if not Path(path).is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", path) is None:
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
