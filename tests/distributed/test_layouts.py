"""Three COPSD steps give the same losses, gradient norms and weights however the model and the batch are cut.

``pytest -s`` prints the table of differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from layouts import LayoutCase, Runs, run_cases, selected
from processes import PUBLIC_DATA, ROOT
from safetensors.torch import load_file
from tiny import make_model, settings, write_config

SINGLE = LayoutCase("1 process", 1)
TP2, TP4, PP2, PP4 = "parallel.tensor=2", "parallel.tensor=4", "parallel.pipeline=2", "parallel.pipeline=4"
SP, VPP2 = "parallel.sequence=true", "parallel.virtual_pipeline=2"
FIRST1, FIRST3, LAST1 = "parallel.first_stage_layers=1", "parallel.first_stage_layers=3", "parallel.last_stage_layers=1"
FULL, SELECTIVE, ONE_LAYER = "parallel.recompute=full", "parallel.recompute=selective", "parallel.recompute_layers=1"
OVERLAP = "parallel.overlap_grad_reduce=true"
CASES = (
    LayoutCase("TP2 SP", 2, (TP2, SP)),
    LayoutCase("DP2", 2),
    # Three microbatches, which interleaving fills up with an empty one.
    LayoutCase("PP2 VPP2", 2, (PP2, VPP2, "optimizer.micro_batch_size=3")),
    LayoutCase("PP2, 3+1 layers", 2, (PP2, FIRST3)),
    LayoutCase("TP2 PP2", 4, (TP2, PP2)),
    LayoutCase("recompute full", 1, (FULL,), slow=True),
    LayoutCase("recompute selective", 1, (SELECTIVE,), slow=True),
    LayoutCase("TP2 SP PP2 VPP2, recompute full of one layer", 4, (TP2, SP, PP2, VPP2, FULL, ONE_LAYER), slow=True),
    LayoutCase("DP2, overlap", 2, (OVERLAP,), slow=True),
    LayoutCase("PP2 VPP2 DP2, overlap", 4, (PP2, VPP2, OVERLAP), slow=True),
    LayoutCase("TP2", 2, (TP2,), slow=True),
    LayoutCase("TP4 SP", 4, (TP4, SP), slow=True),
    LayoutCase("TP4", 4, (TP4,), slow=True),
    LayoutCase("PP2", 2, (PP2,), slow=True),
    LayoutCase("PP4", 4, (PP4,), slow=True),
    LayoutCase("PP2, 1+3 layers", 2, (PP2, FIRST1), slow=True),
    LayoutCase("DP4", 4, slow=True),
    LayoutCase("DP2, optimiser not sharded", 2, ("optimizer.distributed=false",), slow=True),
    LayoutCase("TP2 SP PP2", 4, (TP2, SP, PP2), slow=True),
    LayoutCase("TP2 SP PP2 VPP2", 4, (TP2, SP, PP2, VPP2), slow=True),
    LayoutCase("TP2 DP2", 4, (TP2,), slow=True),
    LayoutCase("TP2 SP DP2", 4, (TP2, SP), slow=True),
    LayoutCase("PP2 DP2", 4, (PP2,), slow=True),
    LayoutCase("PP2 VPP2 DP2", 4, (PP2, VPP2), slow=True),
    LayoutCase("TP2 SP PP2 DP2", 8, (TP2, SP, PP2), slow=True),
    LayoutCase("TP2 SP PP2 VPP2 DP2", 8, (TP2, SP, PP2, VPP2), slow=True),
)


@pytest.fixture(scope="module")
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("layouts")
    model = make_model(folder / "model", "qwen3", num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=4)
    # Untidy on purpose: 7 rollouts divide by neither replicas nor microbatches.
    config = write_config(folder, settings(folder, model, rollout={"prompts_per_step": 7}, optimizer={"eps": 1e-6}))
    return run_cases([SINGLE, *selected(request)], config, load_file(model / "model.safetensors"), folder)


@pytest.mark.parametrize("case", [case.parameter for case in CASES])
def test_tiny_qwen3(tiny: Runs, case: LayoutCase) -> None:
    tiny.assert_same(case, SINGLE)


def compare_all(single: LayoutCase, cases: Sequence[LayoutCase], config: Path, start: dict, folder: Path) -> None:
    """Run all and compare each with the first."""
    runs = run_cases([single, *cases], config, start, folder)
    for case in cases:
        runs.assert_same(case, single)


@pytest.mark.slow
def test_eight_layers(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", num_hidden_layers=8, tie_word_embeddings=False)
    sections = {"rollout": {"prompts_per_step": 7}, "optimizer": {"eps": 1e-6, "micro_batch_size": 1}}
    config = write_config(tmp_path, settings(tmp_path, model, **sections))
    cases = (
        LayoutCase("8 layers, PP4 VPP2", 4, (PP4, VPP2)),
        LayoutCase("8 layers, PP2 VPP2, 6+2 layers", 2, (PP2, VPP2, "parallel.last_stage_layers=2")),
        LayoutCase("8 layers, PP2 VPP4", 2, (PP2, "parallel.virtual_pipeline=4")),
    )
    compare_all(SINGLE, cases, config, load_file(model / "model.safetensors"), tmp_path)


@pytest.mark.skipif(not PUBLIC_DATA.is_dir(), reason="needs the MGSM and GSM8K files (COPSD_DATA)")
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_on_mgsm(smollm2: Path, tmp_path: Path) -> None:
    config = ROOT / "configs" / "smollm2_mgsm_sw.yaml"
    small = tmp_path / "config.yaml"
    text = config.read_text(encoding="utf-8").replace("runs/models/SmolLM2-135M-Instruct", str(smollm2))
    small.write_text(text, encoding="utf-8")
    start = {k: v.float() for k, v in load_file(smollm2 / "model.safetensors").items()}
    short = ("rollout.prompts_per_step=4", "rollout.max_response_tokens=16", "optimizer.micro_batch_size=2",
             "optimizer.lr=1e-3", "optimizer.eps=1e-4")  # fmt: skip
    cases = (
        LayoutCase("SmolLM2-135M, TP3 SP", 3, ("parallel.tensor=3", SP, *short)),
        LayoutCase("SmolLM2-135M, PP2 VPP3", 2, (PP2, "parallel.virtual_pipeline=3", *short)),
        LayoutCase("SmolLM2-135M, DP2", 2, short),
    )
    compare_all(LayoutCase("1 process", 1, short), cases, small, start, tmp_path)
