"""``copsd bench kernels``: measure what a folder of results does not have yet, and report all it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from copsd_tools.bench.kernels.cases import Case
from copsd_tools.bench.kernels.catalogue import FLOOR
from copsd_tools.bench.kernels.measuring.measure import Measurement, measure
from copsd_tools.bench.kernels.measuring.worker import Plan
from copsd_tools.bench.kernels.results.file import Result, append, read
from copsd_tools.bench.kernels.results.report import describe_setting, write_markdown, write_plots
from copsd_tools.bench.kernels.subjects.registry import SUBJECTS
from copsd_tools.bench.provenance import Provenance
from megatron_copsd.errors import UserError, describe

_REFERENCES = (FLOOR, "dense")  # what the ratios of a line are to


def bench_kernels(
    jobs: Mapping[Case, Sequence[str]], plan: Plan, out: Path, source: Provenance, *, fresh: bool, retry: bool
) -> None:
    """Measure every case with its implementations unless ``out`` has them, and write tables and plots of all it has.

    Args:
        jobs: implementations of each case; the floor is measured with them.
        plan: how often.
        out: folder, made if needed.
        source: where the new numbers come from.
        fresh: forget what ``out`` holds.
        retry: measure again what failed.

    Raises:
        UserError: ``out`` holds numbers of another machine.
    """
    console, path = Console(), out / "results.csv"
    if fresh:
        path.unlink(missing_ok=True)
    earlier = read(path)
    _check_source(console, path, earlier, source)
    if retry and any(result.failed for result in earlier):
        earlier = [result for result in earlier if not result.failed]
        path.unlink()
        append(path, earlier)
    known = {(result.case, result.measurement.implementation): result for result in earlier}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(jobs))
        for case, names in jobs.items():
            progress.update(task, description=_title(case))
            missing = [name for name in (FLOOR, *names) if (case, name) not in known]
            if missing:
                progress.console.print(_title(case), markup=False, highlight=False)
                measurements = _measure_missing(case, missing, names, known, plan)
                append(path, [Result(case, measurement, source) for measurement in measurements])
                for measurement in measurements:
                    line = f"  {_summary(measurement)}"
                    progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
            progress.advance(task)
    results = read(path)
    write_markdown(out / "results.md", results, write_plots(out, results))
    console.print(f"{len(results) - len(earlier)} new lines, {len(earlier)} were there", highlight=False)
    console.print(f"tables: {out / 'results.md'}", highlight=False, soft_wrap=True)
    console.print(f"numbers: {path}", highlight=False, soft_wrap=True)


def _measure_missing(
    case: Case,
    missing: Sequence[str],
    names: Sequence[str],
    known: Mapping[tuple[Case, str], Result],
    plan: Plan,
) -> list[Measurement]:
    """Measure what is missing, and again what its ratios are to: those hold within one run only."""
    references: list[str] = []
    implementations = SUBJECTS[case.what].implementations
    if any(implementations[name].refuses(case) is None for name in missing if name != FLOOR):
        earlier = {name: known.get((case, name)) for name in _REFERENCES if name in (FLOOR, *names)}
        references = [name for name, result in earlier.items() if result is not None and not result.failed]
    found = measure(case, [*references, *missing], plan)
    return found[len(references) :]


def _check_source(console: Console, path: Path, earlier: Sequence[Result], source: Provenance) -> None:
    for result in earlier:
        other = result.provenance.device_name
        if other != source.device_name:
            rule = f"holds measurements of {other}, this is {source.device_name}"
            raise UserError(describe("--out", str(path.parent), rule, "Choose another folder, or give --fresh."))
    commits = sorted({result.provenance.commit for result in earlier} - {source.commit})
    if commits:
        text = f"{path} holds measurements of commit {', '.join(commits)}, kept beside those of {source.commit}; "
        console.print(text + "--fresh measures anew", highlight=False, soft_wrap=True)


def _title(case: Case) -> str:
    return f"R = {case.rows}, {describe_setting(case)}"


def _summary(measurement: Measurement) -> str:
    if measurement.median_ms is None:
        return f"{measurement.implementation}: {measurement.note}"
    memory = "" if measurement.peak_mib is None else f", {measurement.peak_mib:.0f} MiB"
    return f"{measurement.implementation}: {measurement.median_ms:.1f} ms{memory}"
