"""Models with experts: equal steps however the experts are spread, their load-balancing loss, and resuming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from layouts import LayoutCase, Runs, run_cases, selected
from processes import ROOT, copsd, metrics, train
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import make_model, settings, write_config
from transformers import AutoModelForCausalLM

from megatron_copsd.hf.folder import TensorReader

SINGLE = LayoutCase("1 process", 1)
EP2, PP2, CP2 = "parallel.expert=2", "parallel.pipeline=2", "parallel.context=2"
TP2_SP = ("parallel.tensor=2", "parallel.sequence=true")
WHOLE_OPTIMIZER = "optimizer.distributed=false"
CASES = (
    LayoutCase("MoE EP2", 2, (EP2,)),
    LayoutCase("MoE TP2 SP EP2", 2, (*TP2_SP, EP2)),
    LayoutCase("MoE DP2", 2, slow=True),
    LayoutCase("MoE TP2 SP", 2, TP2_SP, slow=True),
    LayoutCase("MoE TP2 SP, whole optimizer", 2, (*TP2_SP, WHOLE_OPTIMIZER), slow=True),
    LayoutCase("MoE EP2, whole optimizer", 2, (EP2, WHOLE_OPTIMIZER), slow=True),
    LayoutCase("MoE PP2 EP2", 4, (PP2, EP2), slow=True),
    LayoutCase("MoE TP2 SP EP2 DP2", 4, (*TP2_SP, EP2), slow=True),
    LayoutCase("MoE EP4", 4, ("parallel.expert=4",), slow=True),
)
# One sequence a microbatch: the load-balancing loss then depends on no layout.
BALANCED = ("model.moe_aux_loss=0.1", "optimizer.micro_batch_size=1")


@pytest.fixture(scope="module")
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("experts")
    model = make_model(folder / "model", "qwen3_moe")
    config = write_config(folder, settings(folder, model, rollout={"prompts_per_step": 7}, optimizer={"eps": 1e-6}))
    return run_cases([SINGLE, *selected(request)], config, load_file(model / "model.safetensors"), folder)


@pytest.mark.parametrize("case", [case.parameter for case in CASES])
def test_tiny_qwen3_moe(tiny: Runs, case: LayoutCase) -> None:
    tiny.assert_same(case, SINGLE)


def test_training_moves_router_and_experts(tiny: Runs) -> None:
    start, weights = tiny.start, tiny.outcome(SINGLE).weights
    for part in ("mlp.gate.", "gate_proj", "up_proj", "down_proj"):
        assert any(part in name and not torch.equal(start[name], weights[name]) for name in start), part


@pytest.mark.slow
def test_balanced(tiny: Runs, tmp_path: Path) -> None:
    single = LayoutCase("balanced, 1 process", 1, BALANCED)
    cases = (
        LayoutCase("MoE balanced, EP2", 2, (EP2, *BALANCED)),
        LayoutCase("MoE balanced, packed CP2 EP2", 2, (EP2, CP2, "optimizer.packing=true", *BALANCED)),
        LayoutCase("MoE balanced, TP2 SP PP2", 4, (*TP2_SP, PP2, *BALANCED)),
    )
    runs = run_cases([single, *cases], tiny.plans[SINGLE.name].config, tiny.start, tmp_path)
    plain, balanced = (each.steps[0] for each in (tiny.outcome(SINGLE), runs.outcome(single)))
    assert balanced["loss"] == pytest.approx(plain["loss"], rel=1e-5), "reported is the objective"
    assert balanced["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-3)
    for case in cases:
        runs.assert_same(case, single)


def test_gradient_of_the_load_balancing_loss(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "qwen3_moe")
    printed = run_ranks([ROOT / "tests" / "support" / "balance_worker.py", model], 2, tmp_path, groups=2)
    assert printed.count("1 processes: ") == 3, printed
    assert printed.count("2 processes: ") == 3 * 2, printed


@pytest.mark.slow
def test_resumed_with_spread_experts(tiny: Runs, tmp_path: Path) -> None:
    config = tiny.plans[SINGLE.name].config
    train(config, EP2, f"run.dir={tmp_path / 'whole'}", processes=2)
    train(config, EP2, f"run.dir={tmp_path / 'parts'}", "run.steps=2", processes=2)
    train(config, EP2, f"run.dir={tmp_path / 'parts'}", processes=2)
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert [(line["loss"], line["grad_norm"]) for line in parts] == [
        (line["loss"], line["grad_norm"]) for line in whole
    ]


def test_export_loads_in_transformers(tiny: Runs, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    done = copsd("export", tiny.plans[SINGLE.name].folder, "--out", out)
    assert done.returncode == 0, done.stderr
    reader = TensorReader(out)
    assert reader.names() == tiny.start.keys()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["model_type"] == "qwen3_moe"
    weights = tiny.outcome(SINGLE).weights
    fused = model.model.layers[0].mlp.experts.down_proj
    for number, expert in enumerate(fused):
        assert torch.equal(expert, weights[f"model.layers.0.mlp.experts.{number}.down_proj.weight"])
