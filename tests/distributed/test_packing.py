"""However samples are grouped into microbatches, padded or packed, three COPSD steps are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, torchrun
from tiny import make_model, settings, write_config

TOLERANCE = 1e-5
BY_COUNT = ["optimizer.teacher_micro_batch_size=5"]
BY_TOKENS = ["optimizer.micro_batch_tokens=150", "optimizer.teacher_micro_batch_tokens=600"]
PACKED = ["optimizer.packing=true"]

ONE_PROCESS = {
    "reference": [],
    "by-count": BY_COUNT,
    "packed-by-count": [*BY_COUNT, *PACKED, "teacher.cache=host"],
    "packed": [*BY_TOKENS, *PACKED],
    "packed-live": [*BY_TOKENS, *PACKED, "teacher.weights=live", "rollout.agreement_every=1"],
}
TWO_PROCESSES = {
    "by-tokens-dp2": BY_TOKENS,
    "packed-dp2": [*BY_TOKENS, *PACKED],
    "packed-tp2": [*BY_TOKENS, *PACKED, "parallel.tensor=2"],
    "packed-pp2": [*BY_TOKENS, *PACKED, "parallel.pipeline=2"],
}


CONTEXT = {
    "padded-cp2": ["parallel.context=2"],
    "padded-live-cp2": ["parallel.context=2", "teacher.weights=live", "rollout.agreement_every=1"],
    "packed-cp2": [*BY_TOKENS, *PACKED, "parallel.context=2", "loss.recompute=true"],
}

FOUR_PROCESSES = {
    "cp4": ["parallel.context=4"],
    "packed-cp4": [*BY_TOKENS, *PACKED, "parallel.context=4"],
    "cp2-tp2": ["parallel.context=2", "parallel.tensor=2"],
    "packed-cp2-tp2": [*BY_TOKENS, *PACKED, "parallel.context=2", "parallel.tensor=2"],
    "packed-cp2-pp2": [*BY_TOKENS, *PACKED, "parallel.context=2", "parallel.pipeline=2"],
    # 7 samples on 2 replicas: the last microbatch of one of them is empty.
    "packed-cp2-dp2": ["optimizer.micro_batch_size=1", *PACKED, "parallel.context=2"],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packing")
    # A large eps keeps Adam from turning the rounding of tiny gradients into full steps.
    tree = settings(
        folder,
        make_model(folder / "model", "qwen3"),
        rollout={"prompts_per_step": 7, "max_response_tokens": 24},
        optimizer={"eps": 1e-4},
        loss={"entry_clip": 0.5},
    )
    return write_config(folder, tree)


def run_all(config: Path, runs: dict[str, list[str]], processes: int) -> None:
    worker = ROOT / "tests" / "support" / "steps_worker.py"
    torchrun(worker, config, config.parent, json.dumps(runs), processes=processes)


@pytest.fixture(scope="module")
def one_process(config: Path) -> Path:
    run_all(config, ONE_PROCESS, 1)
    return config.parent


@pytest.fixture(scope="module")
def two_processes(config: Path) -> Path:
    run_all(config, {**TWO_PROCESSES, **CONTEXT}, 2)
    return config.parent


def assert_same(folder: Path, name: str) -> None:
    result, reference = (torch.load(folder / f"{key}.pt", weights_only=True) for key in (name, "reference"))
    for one, other in zip(result["steps"], reference["steps"], strict=True):
        assert one["tokens"] == other["tokens"]
        for number in ("loss", "grad_norm", "teacher_entropy", "student_entropy"):
            assert one[number] == pytest.approx(other[number], rel=TOLERANCE), number
    assert result["weights"].keys() == reference["weights"].keys()
    for weight, tensor in reference["weights"].items():
        difference = float((result["weights"][weight] - tensor).double().norm())
        assert difference <= TOLERANCE * float(tensor.double().norm()), weight


@pytest.mark.parametrize("name", ["by-count", "packed-by-count", "packed"])
def test_groupings(one_process: Path, name: str) -> None:
    assert_same(one_process, name)


@pytest.mark.parametrize("name", [*TWO_PROCESSES, "padded-cp2", "packed-cp2"])
def test_layouts(one_process: Path, two_processes: Path, name: str) -> None:
    assert_same(two_processes, name)


@pytest.mark.parametrize("name", ["packed-live", "padded-live-cp2"])
def test_log_probs_agree_with_the_engine(one_process: Path, two_processes: Path, name: str) -> None:
    steps: list[dict[str, Any]] = torch.load(one_process / f"{name}.pt", weights_only=True)["steps"]
    assert max(step["agreement/max_difference"] for step in steps) < 1e-4


@pytest.mark.slow
def test_context_parallelism_with_the_other_axes(config: Path, one_process: Path) -> None:
    run_all(config, FOUR_PROCESSES, 4)
    for name in FOUR_PROCESSES:
        assert_same(one_process, name)


def test_rollouts_of_a_packed_run_are_complete(one_process: Path, two_processes: Path) -> None:
    def token_losses(name: str) -> list[list[float]]:
        text = (one_process / name / "rollouts" / "step_000001.jsonl").read_text(encoding="utf-8")
        return [json.loads(line)["token_losses"] for line in text.splitlines()]

    reference = token_losses("reference")
    assert len(reference) == 7
    for name in ("packed", *TWO_PROCESSES, "padded-cp2", "packed-cp2"):
        for own, expected in zip(token_losses(name), reference, strict=True):
            assert own == pytest.approx(expected, rel=1e-4, abs=1e-6)
