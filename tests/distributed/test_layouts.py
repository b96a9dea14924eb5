"""Three COPSD steps give the same losses, gradient norms and weights however the model and the batch are cut.

``pytest -s`` prints the table of differences.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from layouts import LayoutCase, Outcome, assert_same, run_case
from processes import ROOT, SHARED_DATA
from safetensors.torch import load_file
from tiny import make_model, settings, write_config

SINGLE = LayoutCase("1 process", 1)
TP2, TP4, PP2 = "parallel.tensor=2", "parallel.tensor=4", "parallel.pipeline=2"
SP = "parallel.sequence=true"
CASES = (
    LayoutCase("TP2", 2, (TP2,)),
    LayoutCase("PP2", 2, (PP2,)),
    LayoutCase("DP2", 2),
    LayoutCase("TP2 SP", 2, (TP2, SP)),
    LayoutCase("TP2 PP2", 4, (TP2, PP2), slow=True),
    LayoutCase("TP2 SP PP2", 4, (TP2, SP, PP2)),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, Outcome]:
    folder = tmp_path_factory.mktemp("layouts")
    model = make_model(folder / "model", "qwen3", num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=4)
    # Untidy on purpose: 7 rollouts divide by neither replicas nor microbatches.
    config = write_config(folder, settings(folder, model, rollout={"prompts_per_step": 7}, optimizer={"eps": 1e-6}))
    return config, load_file(model / "model.safetensors"), run_case(SINGLE, config, folder / "single")


@pytest.mark.parametrize("case", [case.parameter for case in CASES])
def test_tiny_qwen3(tiny: tuple[Path, dict, Outcome], tmp_path: Path, case: LayoutCase) -> None:
    config, start, expected = tiny
    assert_same(run_case(case, config, tmp_path / "run"), expected, start, case.name)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs the MGSM and GSM8K files of ../shared/data")
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_on_mgsm(smollm2: Path, tmp_path: Path) -> None:
    config = ROOT / "configs" / "smollm2_mgsm_sw.yaml"
    small = tmp_path / "config.yaml"
    text = config.read_text(encoding="utf-8")
    small.write_text(text.replace("runs/models/SmolLM2-135M-Instruct", str(smollm2)), encoding="utf-8")
    start = {k: v.float() for k, v in load_file(smollm2 / "model.safetensors").items()}
    short = ("rollout.prompts_per_step=4", "rollout.max_response_tokens=16", "optimizer.micro_batch_size=2")
    expected = run_case(SINGLE, small, tmp_path / "single", *short)
    for case in (LayoutCase("TP3", 3, ("parallel.tensor=3",)), LayoutCase("PP2", 2, (PP2,)), LayoutCase("DP2", 2)):
        assert_same(run_case(case, small, tmp_path / case.name, *short), expected, start, f"SmolLM2 {case.name}")
