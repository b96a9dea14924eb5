"""``copsd sdrrl show``: counts of a build as a table and a picture, and rows beside what they were made of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_copsd.config.sections.sdrrl import CORPUS, QUESTIONS
from megatron_copsd.errors import UserError, describe
from megatron_copsd.languages import language
from megatron_copsd.records.disk import read_text, writing
from megatron_copsd.sdrrl.build import REJECTED, ROWS, SUMMARY


def show(
    folder: Path, *, rows: int | None, subset: str | None, spoken: str | None, rejected: bool, plot: Path | None
) -> None:
    """Print the counts, or rows; draw the counts.

    Args:
        folder: of the build, or a file in it.
        rows: how many to print; None for the counts.
        subset, spoken: only of this subset, of this target language.
        rejected: what was rejected instead.
        plot: picture to draw.

    Raises:
        UserError: there is no finished build, or a file of it is not what a build writes.
    """
    folder = folder.parent if folder.name in (ROWS, REJECTED, SUMMARY) else folder
    target = language(spoken, "--language").code if spoken else None
    console = Console(soft_wrap=True, highlight=False)
    summary = _summary(folder)
    if rows is None:
        console.print(counts_table(summary))
        if any(row["rows"] for row in summary["rejected"]):
            console.print(_reasons_table(summary))
    else:
        shown = 0
        for row in _rows(folder / (REJECTED if rejected else ROWS)):
            if (subset is None or row["subset"] == subset) and (target is None or row["target"] == target):
                console.print(_row_table(row))
                shown += 1
                if shown == rows:
                    break
        if not shown:
            console.print("no such row")
    if plot:
        _draw(summary, plot)
        console.print(f"wrote {plot}")


def counts_table(summary: Mapping[str, Any]) -> Table:
    """Return a table of what was kept and rejected, by language and subset."""
    table = Table("language", "subset", "rows", "rejected")
    for (target, subset), (kept, lost) in _counts(summary).items():
        table.add_row(target, subset, str(kept), str(lost))
    return table


def _counts(summary: Mapping[str, Any]) -> dict[tuple[str, str], tuple[int, int]]:
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for index, name in enumerate(("rows", "rejected")):
        for row in summary[name]:
            pair = list(counts.get((row["target"], row["subset"]), (0, 0)))
            pair[index] += row["rows"]
            counts[row["target"], row["subset"]] = (pair[0], pair[1])
    order = (*QUESTIONS, *CORPUS)
    return dict(sorted(counts.items(), key=lambda item: (item[0][0], order.index(item[0][1]))))


def _reasons_table(summary: Mapping[str, Any]) -> Table:
    table = Table("language", "subset", "rejected", "reason")
    for row in summary["rejected"]:
        table.add_row(row["target"], row["subset"], str(row["rows"]), row["reason"])
    return table


def _row_table(row: Mapping[str, Any]) -> Table:
    table = Table("row", row["id"].replace("[", r"\["), show_lines=True)
    table.add_row("question", Text(row["problem"]))
    table.add_row("response", Text(row["solution"]))
    for name, value in row["provenance"].items():
        name = {"question": "from", "response": "response by"}.get(name, name)
        table.add_row(name, Text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    if "reason" in row:
        table.add_row("rejected", Text(row["reason"]))
    return table


def _summary(folder: Path) -> dict[str, Any]:
    path = folder / SUMMARY
    try:
        found: dict[str, Any] = json.loads(read_text(path))
        _counts(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        rule = f"no finished build is there ({type(error).__name__})"
        raise UserError(describe(str(path), folder.name, rule, "Give the sdrrl.dir of a finished build.")) from error
    return found


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        lines = read_text(path).split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(describe(str(path), path.name, f"can't be read ({error})", "Build again.")) from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            texts = [row[name] for name in ("id", "problem", "solution", "subset", "target")]
            if not all(isinstance(text, str) for text in texts) or not isinstance(row["provenance"], dict):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(describe(f"{path}:{number}", line[:80], "is no row of a build", "Build again.")) from error
        yield row


def _draw(summary: Mapping[str, Any], path: Path) -> None:
    """Draw a bar for each language and subset: what was kept, and on top what was rejected, by reason."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    counts = _counts(summary)
    names = [f"{target} {subset}" for target, subset in counts]
    figure, axes = pyplot.subplots(figsize=(max(7, 0.6 * len(names)), 5), layout="constrained")
    bottom = [kept for kept, _ in counts.values()]
    axes.bar(names, bottom, label="kept")
    for reason in dict.fromkeys(row["reason"] for row in summary["rejected"]):
        lost = [_rejected(summary, key, reason) for key in counts]
        axes.bar(names, lost, bottom=bottom, label=reason)
        bottom = [below + height for below, height in zip(bottom, lost, strict=True)]
    axes.set_ylabel("rows")
    axes.tick_params(axis="x", rotation=60)
    figure.legend(loc="outside upper center", ncols=2)
    with writing(path, "start the same command again"):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def _rejected(summary: Mapping[str, Any], key: Sequence[str], reason: str) -> int:
    return sum(
        row["rows"] for row in summary["rejected"] if (row["target"], row["subset"], row["reason"]) == (*key, reason)
    )
