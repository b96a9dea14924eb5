"""HF -> Megatron -> HF is bitwise the identity for every family, dtype and layout; logits are those of transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from layouts import selected
from processes import ROOT
from ranks import run_ranks
from tiny import make_model

from megatron_copsd.config.schema import ParallelSettings

DTYPES = ("float32", "bfloat16")
VARIANTS = {
    "llama": {"family": "llama"},
    "llama3-rope": {
        "family": "llama",
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "linear-rope": {
        "family": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "qwen2": {"family": "qwen2"},
    "qwen2-untied": {"family": "qwen2", "tie_word_embeddings": False, "num_attention_heads": 8},
    "qwen3": {"family": "qwen3"},
    "qwen3-wide-heads": {"family": "qwen3", "head_dim": 32, "tie_word_embeddings": False},
    "qwen3-moe": {"family": "qwen3_moe"},
    "qwen3-moe-plain-weights": {"family": "qwen3_moe", "norm_topk_prob": False, "tie_word_embeddings": False},
}

# Models by name, as changes of a tiny one.
Models = dict[str, dict[str, Any]]
ALL: Models = {
    f"{name}-{dtype}": {"dtype": getattr(torch, dtype), **changes}
    for name, changes in VARIANTS.items()
    for dtype in DTYPES
}
EXPERTS = {name: changes for name, changes in ALL.items() if "moe" in name and name.endswith("float32")}
SMOLLM2: Models = {"smollm2-float32": {}}


def tied_and_not(layers: int) -> Models:
    return {
        f"{layers}-layers-tied-{tied}-float32": {"num_hidden_layers": layers, "tie_word_embeddings": tied}
        for tied in (True, False)
    }


@dataclass(frozen=True)
class Trip:
    """Models there and back under one layout."""

    name: str
    models: Models
    parallel: ParallelSettings
    slow: bool = False

    @property
    def processes(self) -> int:
        return self.parallel.pipeline * max(self.parallel.tensor, self.parallel.expert)


def trip(name: str, models: Models, slow: bool = False, **sizes: Any) -> Any:
    """A parameter of pytest."""
    case = Trip(name, models, ParallelSettings(**sizes), slow)
    return pytest.param(case, id=name, marks=[pytest.mark.slow] * slow)


TRIPS = (
    trip("1 process", ALL),
    trip("TP2", ALL, tensor=2),
    trip("TP2 PP2", ALL, tensor=2, pipeline=2),
    trip("PP2 VPP2, 4+2 layers", tied_and_not(6), pipeline=2, virtual_pipeline=2, last_stage_layers=2),
    trip("PP4, 1+2+2+2 layers", tied_and_not(7), slow=True, pipeline=4, first_stage_layers=1),
    trip("PP3, 2+6+1 layers", tied_and_not(9), slow=True, pipeline=3, first_stage_layers=2, last_stage_layers=1),
    trip("TP2 PP2 VPP4", tied_and_not(8), slow=True, tensor=2, pipeline=2, virtual_pipeline=4),
    trip("EP2", EXPERTS, expert=2),
    trip("TP2 SP EP2", EXPERTS, tensor=2, sequence=True, expert=2),
    trip("PP2 EP2", EXPERTS, pipeline=2, expert=2),
    trip("SmolLM2, 1 process", SMOLLM2),
    trip("SmolLM2, TP3", SMOLLM2, tensor=3),
)


@pytest.fixture(scope="module")
def printed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What all ranks printed, from one start for all trips."""
    folder = tmp_path_factory.mktemp("weights")
    trips: list[Trip] = selected(request)
    for name, changes in {name: changes for each in trips for name, changes in each.models.items()}.items():
        if changes:
            make_model(folder / name, **changes)
        else:
            (folder / name).symlink_to(request.getfixturevalue("smollm2"))
    listed = [
        {
            "name": each.name,
            "processes": each.processes,
            "parallel": each.parallel.model_dump(),
            "models": [(name.rsplit("-", 1)[1], str(folder / name)) for name in each.models],
        }
        for each in trips
    ]
    (folder / "trips.json").write_text(json.dumps(listed), encoding="utf-8")
    worker = ROOT / "tests" / "support" / "weights_worker.py"
    count = max(each.processes for each in trips)
    return run_ranks([worker, folder / "trips.json"], count, folder, groups=len(trips))


@pytest.mark.parametrize("case", TRIPS)
def test_round_trip(printed: str, case: Trip) -> None:
    whole = case.parallel.tensor == case.parallel.pipeline == 1
    # Every process then runs the model, over its experts and the others'.
    compared = sum(name.endswith("float32") for name in case.models) if whole else 0
    assert printed.count(f"done: {case.name}, logits of {compared}\n") == case.processes, printed
