"""A LoRA adapter as a folder that ``peft`` loads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_copsd.config.schema import LoraSettings, ModelSettings
from megatron_copsd.hf.outputs import new_folder


def write_adapter(
    out: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    model: ModelSettings,
    lora: LoraSettings,
    dtype: torch.dtype,
) -> int:
    """Write a PEFT adapter folder that appears under its name only when it is complete.

    Args:
        out: the folder to make; an existing one is replaced.
        tensors: A [rank, in] and B [out, rank] of each projection, under PEFT's names.
        model: what the adapter belongs to.
        lora: its rank, scale and targets.
        dtype: dtype to store.

    Returns:
        Bytes of weights written.

    Raises:
        UserError: the folder could not be written; nothing is left of it.
    """
    stored = {name: tensor.to(device="cpu", dtype=dtype).contiguous() for name, tensor in tensors}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.path,
        "revision": model.revision,
        "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_folder(out) as partial:
        file = partial / "adapter_model.safetensors"
        save_file(stored, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors writes for the owner alone, and adapters are handed to other teams
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return sum(tensor.nbytes for tensor in stored.values())
