"""transformers' parameters under the names that released checkpoints have."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def as_released(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a transformers model's tensors by their names in files, as views of the same memory.

    transformers 5 holds the experts of a layer in two tensors, ``experts.gate_up_proj`` [E, 2 F, H] and
    ``experts.down_proj`` [E, H, F]; files, also those it saves itself, and engines have three for each expert.

    Args:
        tensors: parameters or the state dict of a model.
    """
    released: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        experts, _, projection = name.rpartition(".")
        if projection == "gate_up_proj" and experts.endswith(".experts"):
            for number, expert in enumerate(tensor.detach()):
                gate, up = expert.chunk(2)
                released[f"{experts}.{number}.gate_proj.weight"] = gate
                released[f"{experts}.{number}.up_proj.weight"] = up
        elif projection == "down_proj" and experts.endswith(".experts"):
            released |= {f"{experts}.{number}.down_proj.weight": down for number, down in enumerate(tensor.detach())}
        else:
            released[name] = tensor
    return released
