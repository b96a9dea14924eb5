"""HF weights into this process's shard of a Megatron model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
from megatron.core.models.gpt import GPTModel

from megatron_copsd.architecture import Architecture
from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.cuts import shard
from megatron_copsd.hf.folder import TensorSource, model_tensors
from megatron_copsd.hf.names import NameTable

_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+")


def named_parameters_globally(chunks: Sequence[GPTModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the parameters of a stage under names whose layer number counts from the model's first layer."""
    for chunk in chunks:
        layers = chunk.decoder.layers
        for name, parameter in chunk.named_parameters():
            local = _LAYER.search(name)
            if local is None:
                yield name, parameter
            else:
                number = layers[int(local.group())].layer_number - 1
                yield f"{name[: local.start()]}{number}{name[local.end() :]}", parameter


def first_expert(chunks: Sequence[GPTModel]) -> int:
    """Return the global number of the first expert that this rank holds; 0 without experts."""
    for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
        return getattr(layer.mlp, "local_expert_indices", (0,))[0]
    return 0


def load_weights(
    chunks: Sequence[GPTModel], architecture: Architecture, source: TensorSource, tp_rank: int, tp_size: int
) -> None:
    """Fill every parameter of a stage from HF tensors, reading only what this rank holds.

    Raises:
        UserError: a tensor is missing, has another shape than the configuration says, holds NaN or infinity, or belongs
            to no parameter.
    """
    model_tensors(architecture, source)
    table = NameTable(architecture)
    with torch.no_grad():
        first = first_expert(chunks)
        for name, parameter in named_parameters_globally(chunks):
            rule = table.rule(name, first)
            rank, size = (0, 1) if rule.expert else (tp_rank, tp_size)
            tensors = [source.get(hf_name) for hf_name in rule.hf]
            part = shard(rule.cut, tensors, architecture, rank, size)
            assert part.shape == parameter.shape, f"{name}: {list(part.shape)} instead of {list(parameter.shape)}"
            parameter.copy_(part)
            if not _is_finite(parameter):
                _refuse_not_finite(source.origin, rule.hf, tensors, parameter.dtype)


def _is_finite(tensor: torch.Tensor) -> bool:
    # The two ends are finite where all is, and take no memory.
    return tensor.is_meta or not tensor.numel() or bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def _refuse_not_finite(
    origin: str, names: Sequence[str], tensors: Sequence[torch.Tensor], dtype: torch.dtype
) -> NoReturn:
    bad = [name for name, tensor in zip(names, tensors, strict=True) if not tensor.isfinite().all()]
    if bad:
        raise UserError(describe(origin, bad[0], "this tensor holds NaN or infinity", "Restore the model's files."))
    rule = f"this tensor holds numbers beyond the range of {dtype}"
    raise UserError(describe(origin, names[0], rule, "Set model.dtype=float32."))
