"""Ways of cutting a training, and how far a run under one is from the same run on one process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, metrics
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor

TOLERANCE = 1e-5


@dataclass(frozen=True)
class LayoutCase:
    """One way of cutting a run.

    Attributes:
        name: shown in tests and tables.
        processes: of the run.
        overrides: settings that make the layout, as ``section.key=value``.
        slow: left out of the default suite.
    """

    name: str
    processes: int
    overrides: tuple[str, ...] = ()
    slow: bool = False

    @property
    def parameter(self) -> object:
        """The case as a parameter of pytest."""
        return pytest.param(self, id=self.name, marks=[pytest.mark.slow] if self.slow else [])


@dataclass(frozen=True)
class PlannedRun:
    """A training under a layout, and where it writes."""

    case: LayoutCase
    config: Path
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """What a run left: the training lines of its metrics, and its weights as HF tensors."""

    steps: list[dict[str, float]]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Runs:
    """Finished runs of one configuration.

    Attributes:
        plans: by the case's name.
        start: the weights that all began with.
        printed: by all processes.
    """

    plans: dict[str, PlannedRun]
    start: dict[str, Tensor]
    printed: str

    def outcome(self, case: LayoutCase) -> Outcome:
        return outcome(self.plans[case.name], self.printed)

    def assert_same(self, case: LayoutCase, expected: LayoutCase) -> None:
        assert_same(self.outcome(case), self.outcome(expected), self.start, case.name)


@dataclass(frozen=True)
class Differences:
    """Largest relative differences between two runs.

    Attributes:
        loss, grad_norm: over the steps, each step's difference over its value.
        weights: norm of the difference over the norm of the weights.
    """

    loss: float
    grad_norm: float
    weights: float

    @property
    def largest(self) -> float:
        return max(self.loss, self.grad_norm, self.weights)

    def row(self, name: str) -> str:
        """One line of the table of equality."""
        return f"| {name} | {self.loss:.1e} | {self.grad_norm:.1e} | {self.weights:.1e} |"


def selected(request: pytest.FixtureRequest) -> list[Any]:
    """Parameters ``case`` of the module's tests that are about to run, for a fixture that does all runs at once."""
    calls = [item.callspec.params for item in request.session.items if item.path == request.path and _has_case(item)]
    found: list[Any] = []
    for call in calls:
        if call["case"] not in found:  # several tests may look at the same
            found.append(call["case"])
    return found


def _has_case(item: pytest.Item) -> bool:
    return "case" in getattr(getattr(item, "callspec", None), "params", {})


def run_cases(cases: Sequence[LayoutCase], config: Path, start: dict[str, Tensor], folder: Path) -> Runs:
    """Train one configuration under each layout."""
    plans = [PlannedRun(case, config, folder / f"run{i}") for i, case in enumerate(cases)]
    return Runs({plan.case.name: plan for plan in plans}, start, run_all(plans, folder))


def run_all(plans: Sequence[PlannedRun], folder: Path) -> str:
    """Do all runs in one set of processes, one after another, as far as they succeed; returns what was printed."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = [
        {
            "processes": plan.case.processes,
            "config": str(plan.config),
            "overrides": list(plan.case.overrides),
            "folder": str(plan.folder),
        }
        for plan in plans
    ]
    (folder / "plan.json").write_text(json.dumps(listed), encoding="utf-8")
    worker = ROOT / "tests" / "support" / "layouts_worker.py"
    count = max(plan.case.processes for plan in plans)
    return run_ranks([worker, folder / "plan.json"], count, folder, groups=len(plans))


def outcome(plan: PlannedRun, printed: str) -> Outcome:
    """Read a finished run; ``printed`` is shown where it did not finish."""
    assert (plan.folder / "weights.safetensors").is_file(), printed
    return Outcome(metrics(plan.folder), load_file(plan.folder / "weights.safetensors"))


def norm(tensors: dict[str, Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference."""
    assert one.keys() == other.keys()
    return norm({name: one[name].double() - other[name].double() for name in one})


def compare(found: Outcome, expected: Outcome) -> Differences:
    """How far a run is from another; the same tokens must have been trained on."""
    pairs = list(zip(found.steps, expected.steps, strict=True))
    assert all(one["num_loss_tokens"] == other["num_loss_tokens"] for one, other in pairs)
    return Differences(
        *(max(abs(one[key] - other[key]) / abs(other[key]) for one, other in pairs) for key in ("loss", "grad_norm")),
        difference(found.weights, expected.weights) / norm(expected.weights),
    )


def assert_same(found: Outcome, expected: Outcome, start: dict[str, Tensor], name: str) -> None:
    """Check a layout against the single process, and print its line of the table (shown by pytest -s)."""
    differences = compare(found, expected)
    print(differences.row(name))
    assert differences.largest < TOLERANCE, differences
    moved = difference(expected.weights, {key: tensor.float() for key, tensor in start.items()})
    assert moved > 100 * TOLERANCE * norm(expected.weights), "so little training hides differences"
