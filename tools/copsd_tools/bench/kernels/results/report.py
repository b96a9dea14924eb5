"""Results for readers: Markdown tables, plots, and the short comparison in the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from copsd_tools.bench.kernels.cases import Case
from copsd_tools.bench.kernels.catalogue import FLOOR
from copsd_tools.bench.kernels.measuring.measure import Measurement
from copsd_tools.bench.kernels.results.file import Result
from copsd_tools.bench.kernels.subjects.registry import SUBJECTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEADING = (
    "R",
    "implementation",
    "chunk",
    "ms",
    "min",
    "spread",
    "/ floor",
    "/ dense",
    "peak MiB",
    "less gradients",
)
_ERRORS = {"hidden": "error dH", "weight": "error dW", "log_prob": "error log-prob", "entropy": "error entropy"}


def group(results: Sequence[Result]) -> dict[Case, list[Result]]:
    """Results by what they share besides R (the key has R = 0), by R and implementation."""
    groups: dict[Case, list[Result]] = {}
    for result in results:
        groups.setdefault(replace(result.case, rows=0), []).append(result)
    for found in groups.values():
        found.sort(key=lambda result: (result.case.rows, _order(result.case).index(result.measurement.implementation)))
    return groups


def write_markdown(path: Path, results: Sequence[Result], plots: dict[Case, Path]) -> None:
    """Tables of all results, with plots of each group and the provenance of the numbers."""
    lines = ["# Benchmark of the loss", "", "Columns and implementations are explained in `docs/benchmarks.md`.", ""]
    lines += ["| device | threads | commit | torch | triton | liger-kernel | cut-cross-entropy | date | command |"]
    lines += ["|" + " --- |" * 9]
    for source, threads in dict.fromkeys((result.provenance, result.case.threads) for result in results):
        versions = (source.torch, source.triton, source.liger_kernel, source.cut_cross_entropy)
        cells = (source.device_name, threads, source.commit, *(version or "none" for version in versions), source.date)
        lines.append(_line(*cells, f"`{source.command}`"))
    for setting, found in group(results).items():
        lines += ["", f"## {describe_setting(setting)}", ""]
        divergences = [r.measurement.teacher_kl for r in found if r.measurement.teacher_kl is not None]
        if divergences:
            lines += [f"KL(teacher||student) of the checked rows: {divergences[0]:.3g} nats.", ""]
        outputs = SUBJECTS[setting.what].outputs
        heading = (*_HEADING, *(_ERRORS[output] for output in outputs), "note")
        lines += [_line(*heading), "|" + " --- |" * len(heading)]
        lines += [_line(result.case.rows, *_cells(result.measurement, outputs)) for result in found]
        if setting in plots:
            lines += ["", f"![time and peak memory]({plots[setting].name})"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def describe_setting(case: Case) -> str:
    """Everything of a case but R, in words."""
    spec = case.spec
    parts = [f"H = {case.hidden}, V = {case.vocab}, {case.dtype}"]
    parts += [spec.kind if case.what == "divergence" else case.what]
    parts += [f"jsd_weight {spec.jsd_weight:g}"] if spec.kind == "jsd" else []
    parts += [f"temperature {spec.temperature:g}"] if spec.temperature != 1 else []
    parts += [f"{name} {getattr(spec, name):g}" for name in ("entry_clip", "token_clip") if getattr(spec, name)]
    parts += ["frozen weight"] if case.frozen_weight else []
    parts += [f"scratch {case.scratch_mb:g} MiB"] if case.scratch_mb is not None else []
    parts += [f"tensor parallel {case.tensor_parallel}"] if case.tensor_parallel > 1 else []
    return ", ".join([*parts, case.device, f"{case.threads} threads" if case.threads > 1 else "1 thread"])


def _order(case: Case) -> list[str]:
    """Implementations in the order of tables, legends and colors."""
    return [FLOOR, *SUBJECTS[case.what].implementations]


def _cells(m: Measurement, outputs: Sequence[str]) -> list[str]:
    def form(value: float | None, spec: str) -> str:
        return "" if value is None else format(value, spec)

    times = [form(value, "#.4g").rstrip(".") for value in (m.median_ms, m.min_ms, m.iqr_ms)]
    ratios = [form(value, ".3f") for value in (m.floor_ratio, m.dense_ratio)]
    memory = [form(value, ".1f") for value in (m.peak_mib, m.extra_mib)]
    errors = [form(value, ".1e") for value in (getattr(m, f"{output}_error") for output in outputs)]
    return [m.implementation, form(m.chunk, "d"), *times, *ratios, *memory, *errors, m.note]


def _line(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def write_plots(folder: Path, results: Sequence[Result]) -> dict[Case, Path]:
    """Draw time and peak memory of each group into one file: lines over R, or bars where there is one R only."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths: dict[Case, Path] = {}
    for setting, found in group(results).items():
        measured = [result for result in found if not result.failed]
        if not measured:
            continue
        figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5))
        draw = _lines if len({result.case.rows for result in measured}) > 1 else _bars
        passes = "forward and backward" if SUBJECTS[setting.what].differentiated else "forward"
        draw(axes[0], measured, "median_ms", f"{passes}, ms")
        draw(axes[1], measured, "peak_mib", "peak memory above inputs, MiB")
        figure.suptitle(describe_setting(setting))
        figure.tight_layout()
        paths[setting] = folder / f"{slug(describe_setting(setting))}.png"
        figure.savefig(paths[setting], dpi=110)
        pyplot.close(figure)
    return paths


def _lines(axes: Axes, results: Sequence[Result], field: str, label: str) -> None:
    for name in _order(results[0].case):
        points = [(r.case.rows, getattr(r.measurement, field)) for r in results if r.measurement.implementation == name]
        points = [(rows, value) for rows, value in points if value is not None]
        if points:
            style = {"color": "black", "linestyle": "--"} if name == FLOOR else {"color": _color(results[0].case, name)}
            axes.plot(*zip(*points, strict=True), marker="o", label=name, **style)
    axes.set(xlabel="R, response rows", ylabel=label, yscale="log")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _bars(axes: Axes, results: Sequence[Result], field: str, label: str) -> None:
    found = [(r.measurement.implementation, getattr(r.measurement, field)) for r in reversed(results)]
    found = [(name, value) for name, value in found if value is not None]
    colors = ["black" if name == FLOOR else _color(results[0].case, name) for name, _ in found]
    bars = axes.barh([name for name, _ in found], [value for _, value in found], color=colors)
    axes.bar_label(bars, fmt="{:.4g}", padding=3, fontsize="small")
    axes.margins(x=0.15)
    axes.set(xlabel=f"{label}, R = {results[0].case.rows}")


def _color(case: Case, name: str) -> str:
    """The same color for an implementation in all plots of a subject."""
    return f"C{_order(case).index(name) - 1}"


def slug(text: str) -> str:
    """Lower case words joined by hyphens, for names of files."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def comparison(case: Case, fused: Measurement, dense: Measurement) -> Table:
    """The short table of ``copsd bench loss``."""
    table = Table("", "fused", "dense", "fused / dense", title=f"R = {case.rows}, {describe_setting(case)}")
    rows = (
        ("ms, forward and backward", ".1f", fused.median_ms, dense.median_ms),
        ("peak MiB above inputs", ".1f", fused.peak_mib, dense.peak_mib),
        ("  the same without the gradients", ".1f", fused.extra_mib, dense.extra_mib),
        ("relative error of dH", ".1e", fused.hidden_error, dense.hidden_error),
        ("relative error of dW", ".1e", fused.weight_error, dense.weight_error),
    )
    for name, form, ours, plain in rows:
        if ours is None or plain is None:
            table.add_row(name, *("" if value is None else format(value, form) for value in (ours, plain)), "")
        else:
            ratio = f"{ours / plain:.3f}" if plain > 0 else "too small to measure"
            table.add_row(name, format(ours, form), format(plain, form), ratio)
    table.caption = f"KL(teacher||student) of the checked rows: {fused.teacher_kl or dense.teacher_kl or 0:.3g} nats"
    return table
