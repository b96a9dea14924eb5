"""Ways of cutting a training, and how far a run under one is from the same run on one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import copsd, metrics, train
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
class Outcome:
    """What a run left: the training lines of its metrics, and its weights as HF tensors."""

    steps: list[dict[str, float]]
    weights: dict[str, Tensor]


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

    def row(self, name: str) -> str:
        """One line of the table of equality."""
        return f"| {name} | {self.loss:.1e} | {self.grad_norm:.1e} | {self.weights:.1e} |"


def run_case(case: LayoutCase, config: Path, folder: Path, *overrides: str) -> Outcome:
    """Train under a layout, export, and read both back."""
    train(config, *case.overrides, *overrides, f"run.dir={folder}", processes=case.processes, timeout=900)
    return outcome(folder)


def outcome(folder: Path) -> Outcome:
    """Read a finished run."""
    done = copsd("export", folder, "--out", folder / "hf")
    assert done.returncode == 0, done.stderr
    return Outcome(metrics(folder), load_file(folder / "hf" / "model.safetensors"))


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
    for value in (differences.loss, differences.grad_norm, differences.weights):
        assert value < TOLERANCE, differences
    moved = difference(expected.weights, {key: tensor.float() for key, tensor in start.items()})
    assert moved > 100 * TOLERANCE * norm(expected.weights), "so little training hides differences"
