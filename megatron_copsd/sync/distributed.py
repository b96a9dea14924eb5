"""Weights through a process group that the trainer's main process shares with all ranks of all servers.

NCCL between GPUs, Gloo on CPUs. Each bucket is broadcast as one tensor of bytes.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from ipaddress import ip_address
from typing import Any, cast
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from megatron_copsd.errors import UserError
from megatron_copsd.rollout.engine import Bucket
from megatron_copsd.rollout.sglang.client import ServerLost, SglangClient
from megatron_copsd.rollout.sglang.ports import address_towards
from megatron_copsd.sync.session import begin_updates, end_updates

_LEAVE_SECONDS = 30.0  # others wait meanwhile, in a collective of training's


class DistributedTransport:
    """Broadcasts every bucket to all servers at once."""

    def __init__(self, server_ranks: int, backend: str, seconds: float) -> None:
        """Take ranks of each server, ``nccl`` or ``gloo``, and how long to wait for anyone."""
        self._server_ranks, self._backend, self._seconds = server_ranks, backend, seconds
        self._group: dist.ProcessGroup | None = None
        self._members: list[SglangClient] = []
        self._name = ""

    def push(
        self,
        buckets: Iterator[Bucket],
        weight_version: int,
        clients: Sequence[SglangClient],
        *,
        flush_cache: bool = True,
    ) -> None:
        """See ``Transport.push``."""
        options = {"weight_version": str(weight_version), "flush_cache": flush_cache}
        with ThreadPoolExecutor(max_workers=len(clients)) as pool:
            with self._group_left_on_failure():
                if self._group is None or self._members != list(clients):
                    self._leave()
                    self._join(clients)
                begin_updates(clients, self._seconds, pool)
            for bucket in buckets:  # made by collectives of the trainer's, whose failures are no server's
                with self._group_left_on_failure():
                    self._send(bucket, options, clients, pool)
            with self._group_left_on_failure():
                end_updates(clients, self._seconds, pool)

    @contextmanager
    def _group_left_on_failure(self) -> Iterator[None]:
        """Leave the group where anything fails: one that a member has left is of no use, and a new one may do.

        Also where a server refuses: because it knows no such group, say, or a broadcast broke.
        """
        try:
            yield
        except (ServerLost, RuntimeError, UserError) as error:
            self._leave()
            raise ServerLost(f"broadcast of the weights: {error}") from error

    def close(self) -> None:
        """Leave the group, and have the servers leave it."""
        self._leave()

    def _send(
        self, bucket: Bucket, options: dict[str, Any], clients: Sequence[SglangClient], pool: ThreadPoolExecutor
    ) -> None:
        body = options | {
            "names": list(bucket.names),
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in bucket.tensors],
            "shapes": [list(tensor.shape) for tensor in bucket.tensors],
            "group_name": self._name,
            "load_format": "flattened_bucket",
        }
        answers = [pool.submit(c.call, "/update_weights_from_distributed", body, self._seconds) for c in clients]
        flat = torch.cat([tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in bucket.tensors])
        work = dist.broadcast(flat, src=0, group=self._group, async_op=True)
        for answer in answers:
            answer.result()
        work.wait()

    def _join(self, clients: Sequence[SglangClient]) -> None:
        """Make a new group: this process is rank 0, then the ranks of each server in turn.

        The way that servers make their side of it (``init_custom_process_group``) is followed to the letter: the keys
        under which members find each other are made of the group's name.
        """
        self._name = f"copsd-{secrets.token_hex(8)}"  # a server refuses a name that another trainer left behind
        host = _own_address(clients)
        world = 1 + self._server_ranks * len(clients)
        timeout = timedelta(seconds=self._seconds)
        store = dist.TCPStore(host, 0, world, is_master=True, timeout=timeout, wait_for_workers=False)
        with ThreadPoolExecutor(max_workers=len(clients)) as pool:
            answers = [
                pool.submit(
                    client.call,
                    "/init_weights_update_group",
                    {
                        "master_address": host,
                        "master_port": store.port,
                        "rank_offset": 1 + self._server_ranks * index,
                        "world_size": world,
                        "group_name": self._name,
                        "backend": self._backend,
                    },
                    self._seconds,
                )
                for index, client in enumerate(clients)
            ]
            try:
                group, _ = c10d._new_process_group_helper(
                    world, 0, [], c10d.Backend(self._backend), dist.PrefixStore(self._name, store),
                    group_name=cast(Any, self._name), timeout=timeout,  # a type of its own in some versions of torch
                )  # fmt: skip
            except (RuntimeError, dist.DistError) as error:
                for answer in answers:
                    answer.result()  # a server's own reason says more
                raise ServerLost(f"joining the servers' process group: {error}") from error
            for answer in answers:
                answer.result()
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
        self._group, self._members = group, list(clients)

    def _leave(self) -> None:
        if self._group is None:
            return
        body = {"group_name": self._name}
        with ThreadPoolExecutor(max_workers=len(self._members)) as pool:
            # All at once: NCCL's members wait for each other.
            calls = [pool.submit(c.call, "/destroy_weights_update_group", body, _LEAVE_SECONDS) for c in self._members]
            with suppress(RuntimeError, ValueError):
                dist.destroy_process_group(self._group)
            for call in calls:
                with suppress(ServerLost, UserError, RuntimeError):  # it may have left already, or not be there
                    call.result()
        self._group, self._members = None, []


def _own_address(clients: Sequence[SglangClient]) -> str:
    """Address at which the servers reach this process; one that is not loopback serves those of this machine too."""
    urls = [urlsplit(client.url) for client in clients]
    found = [address_towards(url.hostname or "", url.port or 80) for url in urls]
    return next((address for address in found if not ip_address(address).is_loopback), found[0])
