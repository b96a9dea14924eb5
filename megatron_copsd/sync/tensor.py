"""Weights through memory that trainer and servers share on one machine: shared memory on CPUs, CUDA IPC on GPUs."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from multiprocessing.reduction import ForkingPickler

import torch

from megatron_copsd.rollout.engine import Bucket
from megatron_copsd.rollout.sglang.client import SglangClient
from megatron_copsd.sync.session import begin_updates, end_updates

_ALIGNMENT = 16  # bytes


class TensorTransport:
    """Hands over handles of tensors; the servers copy what they name."""

    def __init__(self, server_ranks: int, seconds: float) -> None:
        """Take ranks of each server, and how long one may take to load a bucket."""
        self._server_ranks, self._seconds = server_ranks, seconds
        # File descriptors can be handed to children only; names of files under /dev/shm to anyone.
        torch.multiprocessing.set_sharing_strategy("file_system")

    def push(
        self,
        buckets: Iterator[Bucket],
        weight_version: int,
        clients: Sequence[SglangClient],
        *,
        flush_cache: bool = True,
    ) -> None:
        """See ``Transport.push``."""
        with ThreadPoolExecutor(max_workers=len(clients)) as pool:
            begin_updates(clients, self._seconds, pool)
            for bucket in buckets:
                # The copies are held until all servers have answered: the handles do not keep them.
                copies = _shareable_copies(bucket.tensors)
                named = list(zip(bucket.names, copies, strict=True))
                bodies = [
                    {
                        # One pickle for each that reads it: each counts its readers, and frees the memory after one.
                        "serialized_named_tensors": [_handles(named) for _ in range(self._server_ranks)],
                        "weight_version": str(weight_version),
                        "flush_cache": flush_cache,
                    }
                    for _ in clients
                ]
                list(pool.map(lambda c, b: c.call("/update_weights_from_tensor", b, self._seconds), clients, bodies))
            end_updates(clients, self._seconds, pool)

    def close(self) -> None:
        """Nothing to give back: each bucket's memory went with it."""


def _shareable_copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copy tensors into one block of memory that other processes can map: sharing the trainer's own would move it."""
    sizes = [tensor.nbytes for tensor in tensors]
    # A tensor's place in the block has to be a multiple of its items' size.
    starts = list(accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))
    device = tensors[0].device
    if device.type == "cpu":
        # Made where it is shared from; share_memory_() would copy it there.
        block = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(starts[-1]))
    else:
        block = torch.empty(starts[-1], dtype=torch.uint8, device=device)
    copies: list[torch.Tensor] = []
    for tensor, start, size in zip(tensors, starts, sizes, strict=False):
        copy = block[start : start + size].view(tensor.dtype).view(tensor.shape)
        copies.append(copy.copy_(tensor.detach()))
    return copies


def _handles(named: list[tuple[str, torch.Tensor]]) -> str:
    """Pickle tensors by reference to shared memory, as torch does between processes, in base64."""
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(named)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
