"""Megatron's optimiser and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_copsd.config.schema import OptimizerSettings


class Update(NamedTuple):
    """What became of a step's gradients.

    Attributes:
        grad_norm: their norm before clipping.
        learning_rate: the one of the step.
        applied: false where the norm is not finite, or the caller held the step back; the weights are as before.
    """

    grad_norm: float
    learning_rate: float
    applied: bool


@dataclass(frozen=True)
class Optimization:
    """The optimiser and what sets its learning rate."""

    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    def step(self, number: int, *, held: bool = False) -> Update:
        """Apply the accumulated gradients, if they are finite.

        Args:
            number: of the step, from 1; the learning rate is a function of it and of the settings alone.
            held: do everything but apply them.

        Collectives: the gradient norm, and with the distributed optimiser the all-gather of parameters.
        """
        # Step n of a warm-up of w uses lr * n / w, so that no step is spent at zero.
        self.scheduler.num_steps = number
        self.scheduler.step(increment=0)
        learning_rate = max(group["lr"] for group in self.optimizer.param_groups)
        # Megatron's step would apply a gradient whose norm is not finite; so it is measured first.
        overflown = self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        applied = not (held or overflown) and math.isfinite(grad_norm)
        if applied:
            self.optimizer.step()
        return Update(grad_norm, float(learning_rate), applied)


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


# Loading torch's Adam inside Megatron's distributed optimiser. Megatron expects the Adam of Apex or Transformer
# Engine, which counts steps once a parameter group. torch's keeps a ``step`` tensor in every parameter's state, and
# three places of the loading code do not provide for it. With Apex or Transformer Engine nothing below does anything.


# Of a parameter group, what the settings say; the rest is state.
_FROM_SETTINGS = frozenset(("lr", "max_lr", "min_lr", "weight_decay", "wd_mult", "lr_mult", "betas", "eps"))


def allocate_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Give torch's Adam its state before the first step: Megatron asks for it to describe what is loaded or saved."""
    for outer in _around_torch_adam(optimizer):
        for group in outer.optimizer.param_groups:
            for parameter in group["params"]:
                state = outer.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)


def load_optimizer_state(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Load what ``dist_checkpointing.load`` returned for the optimiser; learning rates and the like stay as set."""
    outers = _around_torch_adam(optimizer)
    for outer in outers:
        _accept_tensors_without_step(outer)
    ours = [{name: group[name] for name in group.keys() & _FROM_SETTINGS} for group in optimizer.param_groups]
    optimizer.load_state_dict(loaded)
    for group, settings in zip(optimizer.param_groups, ours, strict=True):
        group.update(settings)
    for outer in outers:
        vars(outer).pop("_set_main_param_and_optimizer_states", None)
        for state in outer.optimizer.state.values():
            # Megatron loads one tensor into all of them; torch's Adam would count it up once for every parameter.
            state["step"] = state["step"].clone()


def _around_torch_adam(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    outers = getattr(optimizer, "chained_optimizers", [optimizer])
    return [outer for outer in outers if isinstance(outer.optimizer, torch.optim.Adam | torch.optim.AdamW)]


def _accept_tensors_without_step(outer: MegatronOptimizer) -> None:
    """Let the per-parameter setter take tensors that lack ``step``, which Megatron leaves out on purpose.

    The counter has been loaded from the parameter groups by then, so the setter is handed the value it already has.
    """
    set_tensors = getattr(outer, "_set_main_param_and_optimizer_states", None)
    if set_tensors is None:
        return  # not the distributed optimiser

    def with_step(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        step = next(iter(outer.optimizer.state.values()))["step"]
        set_tensors(model_param, {"step": step, **tensors})

    outer._set_main_param_and_optimizer_states = with_step
