"""Three COPSD steps give the same losses, gradient norms and weights however the model and the batch are cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import SHARED_DATA, copsd, metrics, train
from safetensors.torch import load_file
from tiny import make_model, settings, write_config

TOLERANCE = 1e-4


def run_layout(
    config: Path, folder: Path, tensor: int, pipeline: int, data: int, *overrides: str
) -> tuple[list[dict], dict]:
    train(
        config,
        *overrides,
        f"run.dir={folder}",
        f"parallel.tensor={tensor}",
        f"parallel.pipeline={pipeline}",
        processes=tensor * pipeline * data,
        timeout=900,
    )
    done = copsd("export", folder, "--out", folder / "hf")
    assert done.returncode == 0, done.stderr
    return metrics(folder), load_file(folder / "hf" / "model.safetensors")


def assert_same(result: tuple[list[dict], dict], reference: tuple[list[dict], dict], start: dict) -> None:
    for one, other in zip(result[0], reference[0], strict=True):
        assert one["num_loss_tokens"] == other["num_loss_tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=TOLERANCE)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=TOLERANCE)
    assert result[1].keys() == reference[1].keys()
    change = sum(float((reference[1][k] - start[k]).double().square().sum()) for k in start) ** 0.5
    difference = sum(float((reference[1][k] - result[1][k]).double().square().sum()) for k in start) ** 0.5
    norm = sum(float(tensor.double().square().sum()) for tensor in start.values()) ** 0.5
    assert change > 0
    assert difference < TOLERANCE * norm
    # Adam turns a tiny gradient of either sign into a full step: the change is compared more loosely than the weights.
    assert difference < 0.02 * change


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, tuple[list[dict], dict]]:
    folder = tmp_path_factory.mktemp("layouts")
    model = make_model(folder / "model", "qwen3")
    # Untidy on purpose: 7 rollouts divide by neither replicas nor microbatches.
    config = write_config(folder, settings(folder, model, rollout={"prompts_per_step": 7}, optimizer={"eps": 1e-6}))
    return config, load_file(model / "model.safetensors"), run_layout(config, folder / "single", 1, 1, 1)


@pytest.mark.parametrize(("tensor", "pipeline", "data"), [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1)])
def test_tiny_qwen3(tiny, tmp_path: Path, tensor: int, pipeline: int, data: int) -> None:
    config, start, reference = tiny
    assert_same(run_layout(config, tmp_path / "run", tensor, pipeline, data), reference, start)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs the MGSM and GSM8K files of ../shared/data")
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_on_mgsm(smollm2: Path, tmp_path: Path) -> None:
    config = Path(__file__).parents[2] / "configs" / "smollm2_mgsm_sw.yaml"
    small = tmp_path / "config.yaml"
    text = config.read_text(encoding="utf-8")
    small.write_text(text.replace("runs/models/SmolLM2-135M-Instruct", str(smollm2)), encoding="utf-8")
    start = {k: v.float() for k, v in load_file(smollm2 / "model.safetensors").items()}
    short = ("rollout.prompts_per_step=4", "rollout.max_response_tokens=16", "optimizer.micro_batch_size=2")
    reference = run_layout(small, tmp_path / "single", 1, 1, 1, *short)
    for tensor, pipeline, data in ((3, 1, 1), (1, 2, 1), (1, 1, 2)):
        folder = tmp_path / f"tp{tensor}pp{pipeline}dp{data}"
        assert_same(run_layout(small, folder, tensor, pipeline, data, *short), reference, start)
