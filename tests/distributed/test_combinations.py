"""Experts and adapters with every way of cutting and packing: the same three COPSD steps as one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from layouts import LayoutCase, Runs, run_cases, selected
from safetensors.torch import load_file
from tiny import make_model, settings, write_config

TP2_SP = ("parallel.tensor=2", "parallel.sequence=true")
PP2, VPP2 = "parallel.pipeline=2", "parallel.virtual_pipeline=2"
CP2, EP2, FULL = "parallel.context=2", "parallel.expert=2", "parallel.recompute=full"
SELECTIVE = "parallel.recompute=selective"
PACKED = (
    "optimizer.packing=true",
    "optimizer.micro_batch_tokens=150",
    "optimizer.teacher_micro_batch_tokens=600",
)
# A large learning rate, for a change that shows beside the whole weights.
LORA = ("lora.rank=4", "optimizer.lr=1e-2", "optimizer.eps=1e-4")
ATTENTION = (*LORA, "lora.targets=[q_proj,k_proj,v_proj,o_proj]")

DENSE, DENSE_LORA = LayoutCase("1 process", 1), LayoutCase("LoRA, 1 process", 1, LORA)
MOE, MOE_LORA = LayoutCase("MoE, 1 process", 1), LayoutCase("MoE LoRA, 1 process", 1, ATTENTION)
DENSE_CASES = (
    LayoutCase("LoRA, packed TP2 SP", 2, (*LORA, *PACKED, *TP2_SP)),
    LayoutCase("LoRA, packed", 1, (*LORA, *PACKED), slow=True),
    LayoutCase("LoRA, DP2", 2, LORA, slow=True),
    LayoutCase("LoRA, CP2", 2, (*LORA, CP2), slow=True),
    LayoutCase("LoRA, PP2 VPP2", 2, (*LORA, PP2, VPP2), slow=True),
    LayoutCase("LoRA, packed CP2 PP2", 4, (*LORA, *PACKED, CP2, PP2), slow=True),
    LayoutCase("LoRA, TP2 SP PP2 VPP2", 4, (*LORA, *TP2_SP, PP2, VPP2), slow=True),
    LayoutCase("LoRA, packed TP2 SP CP2, recompute full", 4, (*LORA, *PACKED, *TP2_SP, CP2, FULL), slow=True),
    LayoutCase("packed TP2 SP PP2 VPP2 CP2", 8, (*PACKED, *TP2_SP, PP2, VPP2, CP2), slow=True),
    LayoutCase("packed TP2 SP PP2 CP2", 8, (*PACKED, *TP2_SP, PP2, CP2), slow=True),
)
MOE_CASES = (
    LayoutCase("MoE, packed CP2 EP2", 2, (*PACKED, CP2, EP2)),
    LayoutCase("MoE, packed", 1, PACKED, slow=True),
    LayoutCase("MoE, packed EP2", 2, (*PACKED, EP2), slow=True),
    LayoutCase("MoE, EP2, recompute full", 2, (EP2, FULL), slow=True),
    LayoutCase("MoE, EP2, recompute selective", 2, (EP2, SELECTIVE), slow=True),
    LayoutCase("MoE, PP2 VPP2 EP2", 4, (PP2, VPP2, EP2), slow=True),
    LayoutCase("MoE, packed TP2 SP EP2 CP2", 4, (*PACKED, *TP2_SP, EP2, CP2), slow=True),
    LayoutCase("MoE, packed TP2 SP PP2 VPP2 EP2", 4, (*PACKED, *TP2_SP, PP2, VPP2, EP2), slow=True),
    LayoutCase("MoE LoRA, packed TP2 SP EP2", 2, (*ATTENTION, *PACKED, *TP2_SP, EP2), slow=True),
)


def run_selected(
    request: pytest.FixtureRequest, folder: Path, family: str, singles: tuple[LayoutCase, ...], cases: tuple
) -> Runs:
    model = make_model(folder / "model", family, num_hidden_layers=4)
    sections = {"rollout": {"prompts_per_step": 7, "max_response_tokens": 24}, "optimizer": {"eps": 1e-4}}
    config = write_config(folder, settings(folder, model, **sections))
    wanted = [case for case in selected(request) if case in cases]
    return run_cases([*singles, *wanted], config, load_file(model / "model.safetensors"), folder)


@pytest.fixture(scope="module")
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_selected(request, tmp_path_factory.mktemp("dense"), "qwen3", (DENSE, DENSE_LORA), DENSE_CASES)


@pytest.fixture(scope="module")
def experts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_selected(request, tmp_path_factory.mktemp("experts"), "qwen3_moe", (MOE, MOE_LORA), MOE_CASES)


@pytest.mark.parametrize("case", [case.parameter for case in DENSE_CASES])
def test_dense(dense: Runs, case: LayoutCase) -> None:
    dense.assert_same(case, DENSE_LORA if case.name.startswith("LoRA") else DENSE)


@pytest.mark.parametrize("case", [case.parameter for case in MOE_CASES])
def test_experts(experts: Runs, case: LayoutCase) -> None:
    experts.assert_same(case, MOE_LORA if case.name.startswith("MoE LoRA") else MOE)
