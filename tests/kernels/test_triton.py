"""The Triton kernels: their test matrix in a process of its own, and what they need of GPUs that are not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from copsd_tools.bench import command as bench
from copsd_tools.bench.compile.ahead_of_time import (
    SHARED_LIMITS,
    TENSOR_CORE_INSTRUCTIONS,
    Configuration,
    configurations,
)
from copsd_tools.bench.compile.resources import compile_all
from megatron_copsd.errors import UserError
from megatron_copsd.loss.divergence import DivergenceSpec, fused_linear_divergence
from megatron_copsd.types import VocabShard

MATRIX = Path(__file__).with_name("triton_matrix.py")


@pytest.mark.parametrize("cases", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_matrix(cases):
    """Compiled where there is a GPU, else under Triton's interpreter, which is chosen before Triton is imported."""
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", cases, str(MATRIX)]
    done = subprocess.run(command, env=os.environ | interpret, capture_output=True, text=True, cwd=MATRIX.parents[2])
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout


def is_common(configuration: Configuration) -> bool:
    """What a training in bfloat16 launches; what else there is (float32, a teacher's own weight) is a slow test."""
    return not configuration.name.startswith("streaming") or (
        configuration.multiplies and "two weights" not in configuration.name
    )


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("common", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_configurations_compile_without_spills(common, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    chosen = [configuration for configuration in configurations() if is_common(configuration) == common]
    compiled = list(compile_all(configurations=chosen))
    assert {capability for _, capability, _ in compiled} == {80, 90, 100}
    assert len(compiled) >= 80
    for configuration, capability, resources in compiled:
        if configuration.multiplies:
            assert TENSOR_CORE_INSTRUCTIONS[capability] in resources.instructions, configuration.name
        assert resources.stack == 0, f"{configuration.name} spills on sm_{capability}"
        assert resources.shared <= SHARED_LIMITS[capability], f"{configuration.name} on sm_{capability}"


def test_compile_command_prints_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert bench.main(["compile", "--capabilities", "90", "--only", "jsd, entry clip"]) == 0
    text = capsys.readouterr().out
    assert "jsd, entry clip: bf16 gradient" in text
    assert "statistics" not in text
    assert "wgmma.mma_async" in text
    assert "registers" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine this is no error")
@pytest.mark.parametrize("implementation", ["chunk", "streaming"])
def test_triton_without_a_gpu_is_refused(implementation):
    hidden, weight = torch.zeros(2, 4), torch.zeros(8, 4)
    with pytest.raises(UserError, match=rf"loss\.implementation.*{implementation}"):
        fused_linear_divergence(
            hidden, hidden, weight, DivergenceSpec(), torch.ones(2), VocabShard(0, 8, 8), implementation=implementation
        )
