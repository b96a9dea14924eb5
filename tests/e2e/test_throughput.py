"""What a run says about its speed: present, right, and nothing invented where the device's peak is not known."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from processes import metrics, train
from tiny import make_model, settings, write_config

from megatron_copsd.config.schema import Config
from megatron_copsd.hf.read import read_architecture
from megatron_copsd.measure.throughput import TRAINING_PHASES, count_flops
from megatron_copsd.plan.steptime import step_flops
from megatron_copsd.types import Problem, PromptPair, Rollout, Sample


def test_metrics_of_a_run(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    config = write_config(tmp_path, settings(tmp_path, model, run={"steps": 1, "dir": str(tmp_path / "run")}))
    train(config, processes=2)
    (line,) = metrics(tmp_path / "run")
    rollouts = [
        json.loads(text)
        for file in sorted((tmp_path / "run" / "rollouts").glob("*.jsonl"))
        for text in file.read_text(encoding="utf-8").splitlines()
    ]
    responses = [len(rollout["response_ids"]) for rollout in rollouts]
    student = [len(r["student_prompt_ids"]) + n for r, n in zip(rollouts, responses, strict=True)]
    teacher = [len(r["teacher_prompt_ids"]) + n for r, n in zip(rollouts, responses, strict=True)]
    flops = step_flops(read_architecture(str(model)), student, teacher, sum(responses))
    # The slowest process's phases count, which are no shorter than those of the process that writes.
    training = sum(line[f"seconds/{phase}"] for phase in TRAINING_PHASES)
    assert 0 < line["model_tflops_per_gpu"] <= 1.000001 * flops.model / training / 2 / 1e12
    assert 0 < line["tokens_per_second_per_gpu"] <= 1.000001 * line["tokens_per_second"] / 2
    assert line["peak_host_gib"] > 0.1
    assert all(line[f"straggler/{phase}"] >= 1 for phase in ("rollout", *TRAINING_PHASES))
    if not torch.cuda.is_available():
        assert not {"mfu", "hfu", "peak_device_gib"} & set(line)


def test_operations_of_samples(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    architecture = read_architecture(str(folder))
    pair = PromptPair(Problem("p", "SWA", "?"), student_prompt=(1,) * 5, teacher_prompt=(1,) * 9)
    sample = Sample(pair, Rollout((2, 3, 4), (0.0,) * 3, "stop", 0, ""), 0)
    plain = settings(tmp_path, folder)
    grpo = settings(tmp_path, folder, objective={"name": "grpo"})
    changed = settings(tmp_path, folder, lora={"rank": 4}, parallel={"recompute": "full"})
    half = settings(tmp_path, folder, parallel={"recompute": "full", "recompute_layers": 1})
    for tree, expected in (
        (plain, step_flops(architecture, [8], [12], 3)),
        (grpo, step_flops(architecture, [8], [], 3)),
        (changed, step_flops(architecture, [8], [12], 3, recompute="full", adapters=True)),
        (half, step_flops(architecture, [8], [12], 3, recompute="full", recomputed=1)),
    ):
        assert count_flops(architecture, [sample], Config.model_validate(tree)) == expected
