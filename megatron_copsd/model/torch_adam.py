"""Loading torch's Adam inside Megatron's distributed optimiser.

Megatron expects the Adam of Apex or Transformer Engine, which counts steps once a parameter group. torch's keeps a
``step`` tensor in every parameter's state, and three places of the loading code do not provide for it. With Apex or
Transformer Engine installed nothing here does anything.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Give torch's Adam its state before the first step: Megatron asks for it to describe what it is about to load."""
    for outer in _around_torch_adam(optimizer):
        for group in outer.optimizer.param_groups:
            for parameter in group["params"]:
                state = outer.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)


def load_state(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Load what ``dist_checkpointing.load`` returned for the optimiser."""
    outers = _around_torch_adam(optimizer)
    for outer in outers:
        _accept_tensors_without_step(outer)
    optimizer.load_state_dict(loaded)
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
