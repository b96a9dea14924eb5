"""However samples are grouped into microbatches, packed, and cut over ranks, three COPSD steps are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from layouts import LayoutCase, Runs, run_cases, selected
from safetensors.torch import load_file
from tiny import make_model, settings, write_config

TP2, PP2, VPP2 = "parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"
SP, CP2, CP4 = "parallel.sequence=true", "parallel.context=2", "parallel.context=4"
BY_COUNT = ("optimizer.teacher_micro_batch_size=5",)
BY_TOKENS = ("optimizer.micro_batch_tokens=150", "optimizer.teacher_micro_batch_tokens=600")
PACKED = (*BY_TOKENS, "optimizer.packing=true")
LIVE = ("teacher.weights=live", "rollout.agreement_every=1")
FULL = "parallel.recompute=full"

SINGLE = LayoutCase("1 process", 1)
CASES = (
    LayoutCase("by count", 1, BY_COUNT),
    LayoutCase("packed by count", 1, (*BY_COUNT, "optimizer.packing=true", "teacher.cache=host"), slow=True),
    LayoutCase("packed", 1, PACKED),
    LayoutCase("by tokens DP2", 2, BY_TOKENS, slow=True),
    LayoutCase("packed DP2", 2, PACKED, slow=True),
    LayoutCase("packed TP2 SP", 2, (*PACKED, TP2, SP)),
    LayoutCase("packed PP2", 2, (*PACKED, PP2), slow=True),
    LayoutCase("CP2", 2, (CP2,), slow=True),
    LayoutCase("packed CP2", 2, (*PACKED, CP2, "loss.recompute=true")),
    LayoutCase("packed recompute", 1, (*PACKED, FULL), slow=True),
    LayoutCase("packed TP2", 2, (*PACKED, TP2), slow=True),
    LayoutCase("packed PP2 VPP2", 2, (*PACKED, PP2, VPP2), slow=True),
    LayoutCase("packed CP2 recompute", 2, (*PACKED, CP2, FULL), slow=True),
    LayoutCase("CP4", 4, (CP4,), slow=True),
    LayoutCase("packed CP4", 4, (*PACKED, CP4), slow=True),
    LayoutCase("CP2 TP2 SP", 4, (CP2, TP2, SP), slow=True),
    LayoutCase("packed CP2 TP2", 4, (*PACKED, CP2, TP2), slow=True),
    LayoutCase("packed CP2 TP2 SP", 4, (*PACKED, CP2, TP2, SP), slow=True),
    LayoutCase("packed CP2 PP2", 4, (*PACKED, CP2, PP2), slow=True),
    LayoutCase("packed CP2 PP2 VPP2", 4, (*PACKED, CP2, PP2, VPP2), slow=True),
    # 7 samples on 2 replicas: the last microbatch of one of them is empty.
    LayoutCase("CP2 DP2", 4, (CP2, "optimizer.micro_batch_size=1"), slow=True),
    LayoutCase("packed CP2 DP2", 4, (CP2, "optimizer.micro_batch_size=1", "optimizer.packing=true"), slow=True),
)
AGREEMENT = (LayoutCase("packed live", 1, (*PACKED, *LIVE)), LayoutCase("CP2 live", 2, (CP2, *LIVE)))


def token_losses(runs: Runs, case: LayoutCase) -> list[list[float]]:
    text = (runs.plans[case.name].folder / "rollouts" / "step_000001.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["token_losses"] for line in text.splitlines()]


@pytest.fixture(scope="module")
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder: Path = tmp_path_factory.mktemp("packing")
    model = make_model(folder / "model", "qwen3", num_hidden_layers=4)
    # A large eps keeps Adam from turning the rounding of tiny gradients into full steps.
    tree = settings(
        folder,
        model,
        rollout={"prompts_per_step": 7, "max_response_tokens": 24},
        optimizer={"eps": 1e-4},
        loss={"entry_clip": 0.5},
    )
    config = write_config(folder, tree)
    return run_cases([SINGLE, *selected(request)], config, load_file(model / "model.safetensors"), folder)


@pytest.mark.parametrize("case", [case.parameter for case in CASES])
def test_same_as_padded_microbatches_on_one_process(tiny: Runs, case: LayoutCase) -> None:
    tiny.assert_same(case, SINGLE)
    for own, expected in zip(token_losses(tiny, case), token_losses(tiny, SINGLE), strict=True):
        assert own == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("case", [case.parameter for case in AGREEMENT])
def test_log_probs_agree_with_the_engine(tiny: Runs, case: LayoutCase) -> None:
    steps = tiny.outcome(case).steps
    assert max(step["agreement/max_difference"] for step in steps) < 1e-4
