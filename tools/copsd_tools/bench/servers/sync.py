"""Pushing a model's weights to SGLang servers, timed by transport."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from copsd_tools.bench.servers.clients import running_clients
from megatron_copsd.config.schema import Config
from megatron_copsd.engines import build_transport
from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.folder import TensorReader, model_tensors, resolve_folder
from megatron_copsd.hf.read import read_architecture
from megatron_copsd.platform import DTYPES
from megatron_copsd.rollout.engine import Request, Sampling
from megatron_copsd.rollout.sglang.client import ServerLost, SglangClient
from megatron_copsd.rollout.sglang.engine import Transport
from megatron_copsd.sync.buckets import in_buckets

_MIB = 1 << 20
_ONE_TOKEN = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=1, stop_ids=())


@dataclass(frozen=True)
class SyncSpeed:
    """One line of results.

    Attributes:
        model, dtype: whose weights, and the dtype that they are sent in.
        servers: how many receive them.
        transport: how they get there.
        bucket_mb: MiB of a bucket.
        gigabytes: 10^9 bytes of weights.
        median_s, min_s: seconds of a push, from weights in memory until all servers sample with them.
        gb_per_second: gigabytes over median seconds.
    """

    model: str
    dtype: str
    servers: int
    transport: str
    bucket_mb: float
    gigabytes: float
    median_s: float
    min_s: float
    gb_per_second: float


def bench_sync(config: Config, transports: Sequence[str], repeats: int) -> list[SyncSpeed]:
    """Push the model's weights to the servers of a configuration, by each transport in turn, once more than counted.

    Raises:
        UserError: a server does not start, refuses, is lost, or samples under another label than it was given.
    """
    if config.sglang.urls and "tensor" in transports:
        rule = "memory is shared with servers of our own only, and sglang.urls names others"
        raise UserError(describe("--transports", " ".join(transports), rule, "Name disk, distributed or both."))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = _weights(config, device)
    size = sum(tensor.nbytes for _, tensor in weights) / 1e9
    speeds: list[SyncSpeed] = []
    version = 0
    with running_clients(config, connections=1) as clients:
        for name in transports:
            seconds: list[float] = []
            with closing(build_transport(_with_transport(config, name), device.type)) as transport:
                for _ in range(1 + repeats):
                    version += 1
                    seconds.append(_push(transport, weights, config.rollout.bucket_mb, version, clients))
            median = statistics.median(seconds[1:])
            speeds.append(
                SyncSpeed(
                    model=config.model.path,
                    dtype=config.model.dtype,
                    servers=len(clients),
                    transport=name,
                    bucket_mb=config.rollout.bucket_mb,
                    gigabytes=size,
                    median_s=median,
                    min_s=min(seconds[1:]),
                    gb_per_second=size / median,
                )
            )
    return speeds


def sync_table(speeds: Sequence[SyncSpeed]) -> Table:
    """The results for the terminal."""
    first = speeds[0]
    title = f"{first.model}, {1e3 * first.gigabytes:.4g} MB in {first.dtype}, {first.servers} server(s)"
    table = Table("transport", "median s", "min s", "GB/s", title=title)
    for speed in speeds:
        table.add_row(speed.transport, f"{speed.median_s:.3f}", f"{speed.min_s:.3f}", f"{speed.gb_per_second:.3f}")
    return table


def _weights(config: Config, device: torch.device) -> list[tuple[str, torch.Tensor]]:
    """The weights as a trainer has them: in memory, on its device, in its dtype."""
    reader = TensorReader(resolve_folder(config.model.path, config.model.revision))
    dtype = DTYPES[config.model.dtype]
    names = model_tensors(read_architecture(config.model.path, config.model.revision), reader)
    return [(name, reader.get(name).to(device, dtype, copy=True)) for name in names]


def _with_transport(config: Config, name: str) -> Config:
    """The configuration with another transport, and weights where a training with the same one has none."""
    sglang = config.sglang.model_copy(update={"transport": name})
    run = config.run.model_copy(update={"dir": str(Path(config.run.dir) / "bench_sync")})
    return config.model_copy(update={"sglang": sglang, "run": run})


def _push(
    transport: Transport,
    weights: Sequence[tuple[str, torch.Tensor]],
    bucket_mb: float,
    version: int,
    clients: Sequence[SglangClient],
) -> float:
    """Push once and see that every server samples under the new label; returns the seconds of the push."""
    try:
        start = time.perf_counter()
        transport.push(in_buckets(weights, int(bucket_mb * _MIB)), version, clients)
        seconds = time.perf_counter() - start
        found = [client.generate(Request((0,), seed=0), _ONE_TOKEN).versions[-1].version for client in clients]
    except ServerLost as error:
        raise UserError(describe("bench sync", f"version {version}", str(error), "See the servers' logs.")) from error
    if found != [version] * len(clients):
        rule = f"servers sample under these labels, not under {version}, which they were given"
        raise UserError(describe("bench sync", found, rule, "See the servers' logs."))
    return seconds
