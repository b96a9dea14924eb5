"""One of two processes that a test starts: trains adapters under several layouts and looks at what was trained.

lora_worker.py CONFIG...: rank 0 first works alone, then both together; results.pt in a configuration's folder gets the
steps and adapters of each layout.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import enter_group

from megatron_copsd import platform
from megatron_copsd.config.load import load_config
from megatron_copsd.hf.folder import TensorReader
from megatron_copsd.types import Microbatch

with platform.importing_megatron():
    from megatron.core import parallel_state

    from megatron_copsd.model.gather import iter_hf_tensors
    from megatron_copsd.model.passes import forward_pass
    from megatron_copsd.model.weights import named_parameters_globally
    from megatron_copsd.run import Run, assemble
    from megatron_copsd.train import make_samples, microbatches, train_step

RESULTS = "results.pt"
# Processes and settings.
LAYOUTS = {
    "single": (1, ()),
    "tp2": (2, ("parallel.tensor=2",)),
    "tp2-sp": (2, ("parallel.tensor=2", "parallel.sequence=true")),
    "pp2": (2, ("parallel.pipeline=2",)),
    "pp2-recompute": (2, ("parallel.pipeline=2", "parallel.recompute=full")),
    "tp2-sp-recompute": (2, ("parallel.tensor=2", "parallel.sequence=true", "parallel.recompute=selective")),
    "pp2-vpp2": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "dp2": (2, ()),
}


def adapters(run: Run) -> dict[str, torch.Tensor]:
    """Every adapter matrix of the model, whole, by global name."""
    own = {}
    for name, parameter in named_parameters_globally(run.model.chunks):
        if not parameter.requires_grad:
            continue
        shards = [torch.empty_like(parameter) for _ in range(run.model.layout.tensor_size)]
        dist.all_gather(shards, parameter.detach(), group=run.model.layout.tensor_group)
        if parameter.tensor_model_parallel:
            own[name] = torch.cat(shards, dim=parameter.partition_dim)
        else:
            assert all(torch.equal(shard, shards[0]) for shard in shards), f"{name} differs between ranks"
            own[name] = shards[0]
    stages: list[dict[str, torch.Tensor]] = [{} for _ in range(run.model.layout.pipeline_size)]
    dist.all_gather_object(stages, own, group=run.model.layout.pipeline_group)
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def train_under(run: Run) -> dict[str, object]:
    """Three steps: their losses and gradient norms, the adapters before and after."""
    before = {name: tensor.clone() for name, tensor in adapters(run).items()}
    steps = [train_step(run, done) for done in range(3)]
    return {"steps": [(step.loss, step.grad_norm) for step in steps], "before": before, "after": adapters(run)}


def check_only_adapters_are_trained(run: Run) -> None:
    named = [pair for chunk in run.model.chunks for pair in chunk.named_parameters()]
    trained = [parameter for _, parameter in named if parameter.requires_grad]
    assert trained
    assert all(".adapters." in name or not p.requires_grad for name, p in named)
    assert sum(len(buffer.params) for ddp in run.ddp for buffer in ddp.buffers) == len(trained)
    assert not any(run.teacher.tensors)


def check_base(run: Run, *, trained: bool) -> None:
    """The model's tensors are the folder's, but for the targets once their adapters have been trained."""
    reader = TensorReader(Path(run.config.model.path))
    tensors = iter_hf_tensors(run.model.chunks, run.model.architecture, *run.model.layout.weight_groups)
    changed = {name.split(".")[-2] for name, tensor in tensors if not torch.equal(tensor, reader.get(name))}
    assert changed == (set(run.config.lora.targets) if trained else set()), changed


def rows_of(run: Run, batches: list[Microbatch]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of the teacher, and of the model as it is."""
    with run.teacher.in_model():
        teacher = forward_pass(run.ddp, batches, _rows)
    return torch.cat(teacher), torch.cat(forward_pass(run.ddp, batches, _rows))


def _rows(_: int, rows: torch.Tensor) -> torch.Tensor:
    return rows


def original_rows(config: Path, folder: Path) -> tuple[list[Microbatch], torch.Tensor]:
    """The teacher's microbatches of step 0, and what the model without adapters makes of them."""
    with started(config, f"run.dir={folder}", "lora.rank=0") as run:
        batches = microbatches(run, make_samples(run, 0), "teacher")
        return batches, rows_of(run, batches)[1]


@contextmanager
def started(config: Path, *overrides: str) -> Iterator[Run]:
    run = assemble(load_config(config, overrides).config)
    with run.monitor or nullcontext():
        yield run
    run.engine.close()
    parallel_state.destroy_model_parallel()
    platform.stop()


def train_all(config: Path, first_group: int) -> None:
    """Every layout that this rank belongs to; rank 0 writes what came of them beside the configuration."""
    rank = int(os.environ["RANK"])
    results: dict[str, object] = {}
    for number, (name, (world, settings)) in enumerate(LAYOUTS.items(), first_group):
        if rank >= world:
            continue
        enter_group(number, world)
        if world == 1:
            batches, original = original_rows(config, config.parent / "original")
        with started(config, f"run.dir={config.parent / name}", *settings) as run:
            check_only_adapters_are_trained(run)
            check_base(run, trained=False)
            results[name] = train_under(run)
            check_base(run, trained=True)
            if world == 1:
                teacher, student = rows_of(run, batches)
                assert run.teacher.output_weight() is None
                assert torch.equal(teacher, original), "the model with its adapters off is not the original one"
                assert not torch.equal(student, original)
    if rank == 0:
        torch.save(results, config.parent / RESULTS)


def main() -> None:
    for number, config in enumerate(sys.argv[1:]):
        train_all(Path(config), number * len(LAYOUTS))


if __name__ == "__main__":
    main()
