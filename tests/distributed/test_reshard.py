"""A checkpoint written under one layout continues under another as if nothing had happened.

``pytest -s`` prints the table of differences.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from layouts import TOLERANCE, LayoutCase, PlannedRun, compare, outcome, run_all, selected
from tiny import make_model, settings, write_config

TP2, PP2, VPP2 = "parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"
SP, FIRST1 = "parallel.sequence=true", "parallel.first_stage_layers=1"
EP2, CP2 = "parallel.expert=2", "parallel.context=2"
EMA = ("teacher.weights=ema", "teacher.ema_decay=0.8")


@dataclass(frozen=True)
class Reshard:
    """Two steps of a model of ``family`` under one layout, then two under another; ``teacher``: settings of both."""

    before: LayoutCase
    after: LayoutCase
    teacher: tuple[str, ...] = ()
    slow: bool = True
    family: str = "qwen3"

    @property
    def name(self) -> str:
        return f"{self.before.name} to {self.after.name}, {'ema' if self.teacher else 'frozen'} teacher"

    def planned(self, folder: Path, config: Path) -> tuple[PlannedRun, PlannedRun]:
        """The run that goes on to step 4 under the first layout, and the one that continues from its step 2."""
        return tuple(
            PlannedRun(dataclasses.replace(case, overrides=(*case.overrides, *self.teacher)), config, folder / part)
            for part, case in (("whole", self.before), ("resumed", self.after))
        )


SINGLE = LayoutCase("1 process", 1)
EVERYTHING = LayoutCase("TP2 SP PP2 VPP2", 4, (TP2, SP, PP2, VPP2))
CASES = (
    # The vocabulary is padded to a multiple of 64 rows a tensor-parallel rank: its shape changes with them.
    Reshard(LayoutCase("TP2", 2, (TP2,)), LayoutCase("PP2 VPP2", 2, (PP2, VPP2)), EMA, slow=False),
    Reshard(SINGLE, LayoutCase("TP2", 2, (TP2,))),
    Reshard(LayoutCase("TP2", 2, (TP2,)), LayoutCase("PP2", 2, (PP2,))),
    Reshard(LayoutCase("PP2", 2, (PP2,)), LayoutCase("DP2", 2), EMA),
    Reshard(LayoutCase("DP2", 2), LayoutCase("TP2 SP", 2, (TP2, SP))),
    Reshard(LayoutCase("TP2 PP2", 4, (TP2, PP2)), SINGLE, EMA),
    Reshard(EVERYTHING, EVERYTHING, EMA),
    Reshard(LayoutCase("PP2 VPP2", 2, (PP2, VPP2)), LayoutCase("PP2, 1+3 layers", 2, (PP2, FIRST1)), EMA),
    Reshard(LayoutCase("MoE EP2", 2, (EP2,)), LayoutCase("MoE PP2", 2, (PP2,)), family="qwen3_moe"),
    Reshard(LayoutCase("MoE TP2 SP", 2, (TP2, SP)), LayoutCase("MoE EP2 CP2", 2, (EP2, CP2)), family="qwen3_moe"),
)


@dataclass(frozen=True)
class Runs:
    """The finished runs of the selected cases, by the case's name, and what all processes printed."""

    pairs: dict[str, tuple[PlannedRun, PlannedRun]]
    printed: str


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("reshard")
    sections = {
        "run": {"steps": 4},
        "checkpoint": {"save_every": 2},
        "optimizer": {"eps": 1e-6, "warmup_steps": 2, "decay": "cosine"},
    }
    cases: list[Reshard] = selected(request)
    configs = {}
    for family in sorted({case.family for case in cases}):
        own = folder / family
        model = make_model(own / "model", family, num_hidden_layers=4)
        configs[family] = write_config(own, settings(own, model, **sections))
    pairs = {case.name: case.planned(folder / str(i), configs[case.family]) for i, case in enumerate(cases)}
    printed = run_all([whole for whole, _ in pairs.values()], folder / "before")
    step = Path("checkpoints") / "step_00000002"
    for whole, resumed in pairs.values():
        if (whole.folder / step).is_dir():
            shutil.copytree(whole.folder / step, resumed.folder / step)
    return Runs(pairs, printed + run_all([resumed for _, resumed in pairs.values()], folder / "after"))


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=[pytest.mark.slow] * c.slow) for c in CASES])
def test_resume_under_another_layout(runs: Runs, case: Reshard) -> None:
    whole, resumed = (outcome(plan, runs.printed) for plan in runs.pairs[case.name])
    assert [line["step"] for line in resumed.steps] == [3, 4]
    differences = compare(resumed, dataclasses.replace(whole, steps=whole.steps[2:]))
    print(differences.row(case.name))
    if case.before == case.after:
        assert differences.largest == 0
    assert differences.largest < TOLERANCE
