"""The configurations of published models: each fits the GPUs that it names, with the planner's own choice of layout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from processes import ROOT

from megatron_copsd.config.check import check
from megatron_copsd.config.load import load_config
from megatron_copsd.plan.hardware import GPUS, Assumptions
from megatron_copsd.plan.memory import memory_plan
from megatron_copsd.plan.published import PUBLISHED, known_architecture
from megatron_copsd.plan.search import SearchSpace, search
from megatron_copsd.plan.workload import layout_from, layout_problems, unplanned, workload_from

CONFIGS = sorted((ROOT / "configs").glob("qwen3_*.yaml"))
COMMAND = re.compile(r"copsd plan (configs/\S+) --gpus (\d+) --gpu (\S+) --search")


def test_every_model_has_one() -> None:
    assert {load_config(path).config.model.path for path in CONFIGS} == set(PUBLISHED)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_layout_is_the_planners_choice(path: Path) -> None:
    loaded = load_config(path)
    check(loaded)
    command = COMMAND.search(path.read_text(encoding="utf-8"))
    assert command, "the file says which command chose its layout"
    assert command[1] == str(path.relative_to(ROOT))
    gpus, gpu = int(command[2]), GPUS[command[3]]
    model, work = known_architecture(loaded.config.model.path), workload_from(loaded.config, gpus)
    assert not unplanned(loaded.config)
    layout = layout_from(loaded.config, gpus)
    assert not layout_problems(model, layout)
    assert memory_plan(model, layout, work, gpu, Assumptions()).fits
    assert search(model, gpus, work, gpu, Assumptions(), SearchSpace()).ranked[0].layout == layout
