"""Started by torchrun: several short trainings one after the other, each under its own overrides.

steps_worker.py CONFIG FOLDER RUNS

RUNS is JSON, {name: [override, ...]}. For each, FOLDER/NAME.pt holds the numbers of every step and the last weights.
One process group for all of them: starting processes takes longer than the training of a tiny model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megatron_copsd import platform
from megatron_copsd.config.load import load_config

with platform.importing_megatron():
    from megatron.core import parallel_state

    from megatron_copsd.assemble import assemble
    from megatron_copsd.hf.gather import iter_hf_tensors
    from megatron_copsd.train import train_step


def main() -> None:
    config_file, folder, runs = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    for name, overrides in runs.items():
        config = load_config(config_file, [*overrides, f"run.dir={folder / name}"]).config
        run = assemble(config)
        results = [train_step(run, done) for done in range(config.run.steps)]
        steps = [{"loss": r.loss, "grad_norm": r.grad_norm, "tokens": r.num_loss_tokens, **r.metrics} for r in results]
        weights = dict(iter_hf_tensors(run.model, run.architecture, run.layout.tensor_group, run.layout.pipeline_group))
        if run.monitor:
            torch.save({"steps": steps, "weights": weights}, folder / f"{name}.pt")
        parallel_state.destroy_model_parallel()
    platform.stop()


if __name__ == "__main__":
    main()
