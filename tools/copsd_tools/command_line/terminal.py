"""What commands print: tables of numbers, and lines that are passed on as they are."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def number_table(title: str, labels: Sequence[str], numbers: Sequence[str]) -> Table:
    """Return an empty table whose first columns are words, and the others numbers, set to the right."""
    table = Table(*labels, title=title)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def say(text: str, console: Console | None = None) -> None:
    """Print a line as it is: no markup, no colors, and no breaks, which would cut paths and addresses in two."""
    (console or Console()).print(text, markup=False, highlight=False, soft_wrap=True)
