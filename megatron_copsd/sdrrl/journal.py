"""Finished work of a build, a line each, so that a build that was stopped anywhere goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_copsd.errors import UserError, describe
from megatron_copsd.records.disk import appending, read_bytes, replacing


class Journal:
    """A JSONL file of rows by key; a row that is there is finished."""

    def __init__(self, path: Path, fields: Sequence[str]) -> None:
        """Read what is there; a last line that a kill cut short is removed.

        Args:
            path: the file, which need not be there.
            fields: what each row has besides its key.

        Raises:
            UserError: it can't be read, or a line is not one of a journal's.
        """
        self._path = path
        self._rows: dict[str, Mapping[str, Any]] = {}
        if not os.path.lexists(path):
            return
        # Cut as bytes: a kill may have cut within a character.
        try:
            data = read_bytes(path)
        except OSError as error:
            rule = f"can't be read ({error.strerror})"
            raise UserError(describe(str(path), path.name, rule, "Move it away.")) from error
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            with replacing(path) as partial:
                partial.write_bytes(whole)
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                row = json.loads(line)
                for field in ("key", *fields):
                    row[field]
                self._rows[row["key"]] = row
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                rule = "is not a line that a build has written"
                remedy = "Remove it: its work is done again."
                raise UserError(describe(f"{path}:{number}", repr(line[:80]), rule, remedy)) from error

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> Mapping[str, Any]:
        return self._rows[key]

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add finished rows, each with its ``key``; they are on the disk when it returns.

        Raises:
            UserError: the disk refuses them; the file then ends with the rows of before.
        """
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with appending(self._path) as file:
            file.write(lines)
        self._rows |= {row["key"]: row for row in rows}
