"""HF -> Megatron -> HF is bitwise the identity for every family, dtype and layout; logits are those of transformers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import pytest
import torch
from processes import ROOT, environment
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


def run_worker(parallel: ParallelSettings, folders: list[Path], dtypes: Sequence[str] = ("float32",)) -> str:
    """Run every folder under one dtype, or each under its own, in the same processes; returns what they printed."""
    worker = ROOT / "tests" / "support" / "weights_worker.py"
    count = parallel.pipeline * max(parallel.tensor, parallel.expert)
    processes = ["--nproc-per-node", str(count), "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *processes,
        str(worker),
        parallel.model_dump_json(),
    ]
    models = [f"{dtype}:{folder}" for dtype, folder in zip(cycle(dtypes), folders, strict=False)]
    done = subprocess.run(
        [*command, *models], capture_output=True, text=True, timeout=500, env=environment(), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (2, 2)])
def test_round_trip(tmp_path: Path, tensor: int, pipeline: int) -> None:
    folders = [
        make_model(tmp_path / f"{name}-{dtype}", dtype=getattr(torch, dtype), **changes)
        for name, changes in VARIANTS.items()
        for dtype in DTYPES
    ]
    output = run_worker(ParallelSettings(tensor=tensor, pipeline=pipeline), folders, DTYPES)
    if tensor == pipeline == 1:
        assert output.count("largest difference of logits") == len(VARIANTS)


@pytest.mark.parametrize(
    ("layers", "cut"),
    [
        (6, {"pipeline": 2, "virtual_pipeline": 2, "last_stage_layers": 2}),
        pytest.param(7, {"pipeline": 4, "first_stage_layers": 1}, marks=pytest.mark.slow),
        pytest.param(9, {"pipeline": 3, "first_stage_layers": 2, "last_stage_layers": 1}, marks=pytest.mark.slow),
        pytest.param(8, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_stages_and_chunks(tmp_path: Path, layers: int, cut: dict[str, int]) -> None:
    folders = [
        make_model(tmp_path / f"tied-{tied}", num_hidden_layers=layers, tie_word_embeddings=tied)
        for tied in (True, False)
    ]
    run_worker(ParallelSettings(**cut), folders)


@pytest.mark.parametrize(("tensor", "pipeline", "expert"), [(1, 1, 2), (2, 1, 2), (1, 2, 2)])
def test_round_trip_of_spread_experts(tmp_path: Path, tensor: int, pipeline: int, expert: int) -> None:
    variants = {name: changes for name, changes in VARIANTS.items() if changes["family"] == "qwen3_moe"}
    folders = [make_model(tmp_path / name, **changes) for name, changes in variants.items()]
    cut = ParallelSettings(tensor=tensor, pipeline=pipeline, expert=expert, sequence=tensor > 1)
    output = run_worker(cut, folders)
    if tensor == pipeline == 1:  # every process runs the model over its experts and the other's
        assert output.count("largest difference of logits") == expert * len(folders)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (3, 1)])
def test_smollm2(smollm2: Path, tmp_path: Path, tensor: int, pipeline: int) -> None:
    folder = tmp_path / "smollm2"
    folder.symlink_to(smollm2)
    run_worker(ParallelSettings(tensor=tensor, pipeline=pipeline), [folder])
