"""The trainer's weights as HF-named buckets: the one form in which every transport and engine takes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from megatron_copsd.rollout.engine import Bucket


def in_buckets(tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[Bucket]:
    """Group full tensors into buckets of at most ``bucket_bytes``; a larger tensor gets a bucket of its own.

    Args:
        tensors: HF names and full tensors; read as the buckets are, so one bucket is held at a time.
        bucket_bytes: limit.
    """
    names: list[str] = []
    held: list[torch.Tensor] = []
    size = 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > bucket_bytes:
            yield Bucket(tuple(names), tuple(held))
            names, held, size = [], [], 0
        names.append(name)
        held.append(tensor)
        size += tensor.nbytes
    if held:
        yield Bucket(tuple(names), tuple(held))
