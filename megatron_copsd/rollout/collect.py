"""Spreading requests over the processes of a run and bringing every rollout to all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch.distributed as dist

from megatron_copsd.rollout.engine import Request, Sampling
from megatron_copsd.types import Rollout


def rollout_seed(run_seed: int, step: int, index: int) -> int:
    """Return the sampling seed of the ``index``-th response of a step: a pure function, so nothing need be saved."""
    digest = hashlib.blake2b(f"{run_seed}/{step}/{index}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def collect(
    generate: Callable[[Sequence[Request], Sampling], list[Rollout]], requests: Sequence[Request], sampling: Sampling
) -> list[Rollout]:
    """Sample every request once, each process a contiguous share by its own ``generate``; all get all rollouts.

    Collectives: one all-gather of Python objects over the world.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    bounds = [len(requests) * i // world for i in range(world + 1)]
    own = generate(requests[bounds[rank] : bounds[rank + 1]], sampling)
    if world == 1:
        return own
    shares: list[list[Rollout]] = [[] for _ in range(world)]
    dist.all_gather_object(shares, own)
    return [rollout for share in shares for rollout in share]
