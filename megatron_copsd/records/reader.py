"""Reading what a run has recorded."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_copsd.errors import UserError, describe
from megatron_copsd.records.disk import read_text
from megatron_copsd.records.paths import RunFolder

_EVALUATION = "eval/"

Numbers = Mapping[str, float]
"""Named numbers of a step, ``step`` among them."""


@dataclass(frozen=True)
class Metrics:
    """The lines of metrics.jsonl, in the order in which they were written.

    Attributes:
        steps: of training steps, with ``loss`` and what docs/metrics.md lists.
        evaluations: of held-out sources, with keys of the form ``eval/<source>/accuracy``.
    """

    steps: tuple[Numbers, ...]
    evaluations: tuple[Numbers, ...]

    def evaluated(self, source: str, name: str) -> dict[int, float]:
        """Return one number of a held-out source by step."""
        key = f"{_EVALUATION}{source}/{name}"
        return {int(line["step"]): line[key] for line in self.evaluations if key in line}


def read_metrics(folder: Path) -> Metrics:
    """Read the numbers of a run; a last line that was cut short by a kill is left out.

    Raises:
        UserError: the folder has none, or a line is not one of them.
    """
    run = RunFolder(folder)
    run.require_known_format()
    lines = list(json_lines(run.metrics))
    evaluations = [any(key.startswith(_EVALUATION) for key in line) for line in lines]
    return Metrics(
        steps=tuple(line for line, evaluation in zip(lines, evaluations, strict=True) if not evaluation),
        evaluations=tuple(line for line, evaluation in zip(lines, evaluations, strict=True) if evaluation),
    )


def recorded_lines(path: Path) -> list[Mapping[str, Any]]:
    """Return the lines of a file of numbers, none where there is no file yet.

    Raises:
        UserError: as for ``json_lines``.
    """
    return list(json_lines(path)) if os.path.lexists(path) else []


def read_rollouts(folder: Path, step: int) -> tuple[Mapping[str, Any], ...]:
    """Read the rollouts of a step, with the keys that ``rollouts.write_rollouts`` gives them.

    Raises:
        UserError: those of the step were not written, or a line is not one of them.
    """
    run = RunFolder(folder)
    run.require_known_format()
    return tuple(json_lines(run.rollouts_of(step)))


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file of numbers or rollouts; a last one that was cut short by a kill is left out.

    Raises:
        UserError: the file can't be read, or a line is not one of them.
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        rule = f"can't be read ({error})"
        raise UserError(
            describe(str(path), path.name, rule, "Give the run.dir of a training, or move it away.")
        ) from error
    lines = io.StringIO(text).readlines()  # ended by \n alone: a text may hold other ends of lines
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line)
            if isinstance(found, dict) and type(found.get("step")) is int:
                yield found
                continue
            rule = "is not a JSON object with a step"
        except (ValueError, RecursionError) as error:
            if number == len(lines) and not line.endswith("\n"):
                return
            rule = f"is not JSON ({error})"
        raise UserError(describe(f"{path}:{number}", line[:80].rstrip(), rule, "Remove the line."))
