"""What the methods of ``copsd demo --methods`` have made of the same models, side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from copsd_tools.command_line.checkout import version
from copsd_tools.command_line.terminal import say
from copsd_tools.demo.methods import run_folder
from copsd_tools.demo.report import LANGUAGES
from copsd_tools.demo.stages import Folders
from megatron_copsd.evaluate.metrics import wilson_interval
from megatron_copsd.records.disk import read_text, replace_text, writing
from megatron_copsd.records.reader import read_metrics

TABLE, PICTURE, NUMBERS = "methods.md", "methods.png", "methods.json"
COMPARED = (TABLE, PICTURE, NUMBERS)
_BASE = "base"


@dataclass(frozen=True)
class Result:
    """One run's end.

    Attributes:
        accuracy: right answers of the held-out problems, by language.
        format_rate: share of responses whose answer stands behind its marker, of both languages.
        tokens: of responses that were trained on.
        seconds: of training steps, evaluation apart.
    """

    accuracy: Mapping[str, float]
    format_rate: float
    tokens: int
    seconds: float


def report(out: Path, parts: Mapping[int, Folders], methods: Sequence[str]) -> None:
    """Print and write a table and a picture of all methods over all seeds, and the numbers behind them."""
    found = {
        method: {seed: _result(folders, method) for seed, folders in parts.items()} for method in (_BASE, *methods)
    }
    problems = sum(len(read_text(folders.data / "heldout_sw.jsonl").splitlines()) for folders in parts.values())
    lines = _table(found, problems)
    numbers = {
        method: {str(seed): vars(result) for seed, result in results.items()} for method, results in found.items()
    }
    contents = {"version": version(), "problems": problems, "methods": numbers}
    replace_text(out / NUMBERS, json.dumps(contents, indent=1) + "\n")
    replace_text(out / TABLE, "".join(f"{line}\n" for line in lines))
    _draw(out / PICTURE, found, problems)
    say(f"Greedy accuracy on {problems} held-out problems a language, with 95 % intervals:")
    for line in lines:
        say(line)
    for name in COMPARED:
        say(f"  {out / name}")


def _result(folders: Folders, method: str) -> Result:
    metrics = read_metrics(folders.sft if method == _BASE else run_folder(folders, method))
    last = metrics.evaluations[-1]
    rates = [last[f"eval/{language}/format_rate"] for language in LANGUAGES]
    tokens = sum(line["num_loss_tokens"] for line in metrics.steps)
    seconds = sum(value for line in metrics.steps for name, value in line.items() if name.startswith("seconds/"))
    accuracy = {language: last[f"eval/{language}/accuracy"] for language in LANGUAGES}
    return Result(accuracy, math.fsum(rates) / len(rates), int(tokens), seconds)


def _pooled(results: Mapping[int, Result], language: str, problems: int) -> tuple[float, float, float]:
    """Return accuracy over the problems of all seeds with its 95 % interval, in percent."""
    share = math.fsum(result.accuracy[language] for result in results.values()) / len(results)
    low, high = wilson_interval(share, problems)
    return 100 * share, 100 * low, 100 * high


def _cells(results: Mapping[int, Result], problems: int) -> list[str]:
    cells = []
    for language in LANGUAGES:
        share, low, high = _pooled(results, language, problems)
        each = " ".join(f"{100 * result.accuracy[language]:.1f}" for result in results.values())
        cells += [f"{share:.1f} ({low:.1f}-{high:.1f})", each]
    count = len(results)
    cells.append(f"{100 * math.fsum(result.format_rate for result in results.values()) / count:.1f}")
    tokens, seconds = sum(one.tokens for one in results.values()), math.fsum(one.seconds for one in results.values())
    cells += [f"{tokens / count:,.0f}", f"{tokens / seconds:,.0f}"]
    return cells


def _columns() -> list[str]:
    names = [name for language in LANGUAGES for name in (f"{language.capitalize()}, %", "by seed")]
    return [*names, "format, %", "tokens", "tokens/s"]


def _table(found: Mapping[str, Mapping[int, Result]], problems: int) -> list[str]:
    rows = [["method", *_columns()], ["---"] * (1 + len(_columns()))]
    rows += [[method, *_cells(results, problems)] for method, results in found.items()]
    rows[2][-2:] = "-", "-"  # stage 1 is not compared
    return [f"| {' | '.join(row)} |" for row in rows]


def _draw(path: Path, found: Mapping[str, Mapping[int, Result]], problems: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(LANGUAGES), figsize=(10, 0.6 + 0.45 * len(found)), sharey=True)
    places = range(len(found))
    for one, language in zip(axes, LANGUAGES, strict=True):
        pooled = [_pooled(results, language, problems) for results in found.values()]
        shares = [share for share, _, _ in pooled]
        bars = [[share - low for share, low, _ in pooled], [high - share for share, _, high in pooled]]
        one.barh(places, shares, xerr=bars, color=["tab:gray", *["tab:blue"] * (len(found) - 1)], capsize=3)
        for place, results in zip(places, found.values(), strict=True):
            one.plot([100 * r.accuracy[language] for r in results.values()], [place] * len(results), "k.", markersize=5)
        one.set(xlabel=f"{language.capitalize()}: held-out accuracy, %", xlim=(0, 102))
        one.grid(alpha=0.3, axis="x")
    axes[0].set_yticks(places, list(found))
    axes[0].invert_yaxis()
    figure.tight_layout()
    with writing(path, "start the same command again"):
        figure.savefig(path, dpi=120)
