"""How well a step used its machines: operations, tokens, memory, and how far the slowest process lags."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_copsd.architecture import Architecture, recomputed_layers
from megatron_copsd.config.schema import Config
from megatron_copsd.plan.hardware import peak_flops
from megatron_copsd.plan.steptime import StepFlops, step_flops
from megatron_copsd.types import Sample

TRAINING_PHASES = ("teacher", "student", "update")
_GIB = 1 << 30
_KIB = 1 << 10


def count_flops(architecture: Architecture, samples: Sequence[Sample], config: Config) -> StepFlops:
    """Count the operations of a step over all processes, padding as nothing."""
    responses = [len(sample.rollout.response) for sample in samples]
    student = [len(s.pair.student_prompt) + n for s, n in zip(samples, responses, strict=True)]
    teacher = [len(s.pair.teacher_prompt) + n for s, n in zip(samples, responses, strict=True)]
    return step_flops(
        architecture,
        student,
        teacher if config.method.uses_teacher else [],
        sum(responses),
        recompute=config.parallel.recompute,
        recomputed=sum(recomputed_layers(architecture.layers, config.parallel)),
        loss_recompute=config.loss.recompute,
        adapters=config.lora.rank > 0,
    )


def throughput_metrics(
    flops: StepFlops, tokens: int, seconds: Mapping[str, float], device: torch.device
) -> dict[str, float]:
    """Return how fast the step was, the same on every process.

    * ``model_tflops_per_gpu``: model operations a second of the training phases, for each process, in 1e12.
    * ``mfu``, ``hfu``: model operations, and all, over the device's bfloat16 peak; left out where that is not known.
    * ``tokens_per_second_per_gpu``: response tokens over the whole step and all processes.
    * ``peak_device_gib``, ``peak_host_gib``: most that a process held on its GPU in this step, on its host so far.
    * ``straggler/<phase>``: the slowest process's time over the median one's.

    Args:
        flops: of the step, over all processes.
        tokens: response tokens of the step.
        seconds: this process's wall time by phase; every process has the same phases.
        device: where it computes.

    Collectives: one all_gather of a few numbers over the world.
    """
    own = [*seconds.values(), *_peak_memory(device)]
    gathered = _gather(own, device)
    times = dict(zip(seconds, gathered.T, strict=False))
    slowest = {phase: float(values.max()) for phase, values in times.items()}
    trained = sum(slowest.get(phase, 0.0) for phase in TRAINING_PHASES) * len(gathered)
    metrics = {
        "model_tflops_per_gpu": flops.model / trained / 1e12,
        "tokens_per_second_per_gpu": tokens / sum(slowest.values()) / len(gathered),
        "peak_host_gib": float(gathered[:, -1].max()),
    }
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak:
        metrics |= {"mfu": flops.model / trained / peak, "hfu": flops.hardware / trained / peak}
    if device.type == "cuda":
        metrics["peak_device_gib"] = float(gathered[:, -2].max())
    # A phase that lasts no time, as the rollout of supervised training, has no laggards.
    lags = {phase: float(values.max() / values.median().clamp(min=1e-9)) for phase, values in times.items()}
    return metrics | {f"straggler/{phase}": lag for phase, lag in lags.items()}


def _gather(numbers: Sequence[float], device: torch.device) -> torch.Tensor:
    """Every process's numbers, [world, numbers] float64 on the CPU."""
    own = torch.tensor(numbers, dtype=torch.float64, device=device)
    everywhere = torch.empty(dist.get_world_size(), len(numbers), dtype=torch.float64, device=device)
    dist.all_gather(list(everywhere), own)
    return everywhere.cpu()


def _peak_memory(device: torch.device) -> tuple[float, float]:
    """Most GiB held on the device since the last call, and resident on the host since the process began."""
    on_device = 0.0
    if device.type == "cuda":
        on_device = torch.cuda.max_memory_allocated(device) / _GIB
        torch.cuda.reset_peak_memory_stats(device)
    return on_device, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB / _GIB
