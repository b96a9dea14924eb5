"""Megatron's optimiser and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_copsd.config.schema import OptimizerSettings


@dataclass(frozen=True)
class Optimization:
    """The optimiser and what sets its learning rate."""

    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    def step(self) -> tuple[float, float]:
        """Apply the accumulated gradients.

        Returns:
            The gradient norm before clipping, and the learning rate used.

        Collectives: the gradient norm, and with the distributed optimiser the all-gather of parameters.
        """
        # Advancing first makes step n of a warm-up of w use lr * n / w, so that no step is spent at zero.
        self.scheduler.step(increment=1)
        learning_rate = max(group["lr"] for group in self.optimizer.param_groups)
        _, grad_norm, _ = self.optimizer.step()
        return float(grad_norm), float(learning_rate)


def build_optimization(
    chunks: Sequence[DistributedDataParallel], settings: OptimizerSettings, steps: int
) -> Optimization:
    """Build Adam over all chunks of the stage, and the schedule for a run of ``steps`` steps."""
    dtype = chunks[0].config.params_dtype
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        # Megatron computes the norm only when it clips; an infinite cap measures without clipping.
        clip_grad=settings.clip_grad or float("inf"),
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=settings.distributed,
    )
    optimizer = get_megatron_optimizer(config, list(chunks))
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=min(settings.min_lr, settings.lr) if settings.decay != "constant" else settings.lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=max(steps, settings.warmup_steps + 1),
        lr_decay_style=settings.decay,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return Optimization(optimizer, scheduler)
