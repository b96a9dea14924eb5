"""The rollout engine and the weight transport that a configuration asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Literal, assert_never

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_copsd import platform
from megatron_copsd.architecture import Architecture
from megatron_copsd.config.check import check_nodes
from megatron_copsd.config.schema import Config
from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.folder import TensorReader, model_tensors, read_hf_config, resolve_folder
from megatron_copsd.hf.read import read_architecture
from megatron_copsd.platform import DTYPES
from megatron_copsd.records.paths import RunFolder
from megatron_copsd.rollout.embedded import EmbeddedEngine
from megatron_copsd.rollout.engine import RolloutEngine
from megatron_copsd.rollout.sglang.client import Limits, SglangClient
from megatron_copsd.rollout.sglang.engine import EngineOptions, SglangEngine, Transport, Verifier
from megatron_copsd.rollout.sglang.fleet import Fleet
from megatron_copsd.rollout.sglang.process import SglangServer, plan_servers
from megatron_copsd.sync.buckets import in_buckets
from megatron_copsd.sync.checksums import WeightChecksums
from megatron_copsd.sync.disk import DiskTransport
from megatron_copsd.sync.distributed import DistributedTransport
from megatron_copsd.sync.log_probs import ProbeLogProbs
from megatron_copsd.sync.tensor import TensorTransport

_MIB = 1 << 20

EngineKind = Literal["embedded", "sglang"]


def open_engine(
    config: Config,
    kind: EngineKind,
    tokenizer: PreTrainedTokenizerBase,
    here: platform.Platform,
    say: Callable[[str], None] | None = None,
) -> RolloutEngine:
    """Return this process's part of an engine of ``config.model``; it samples once it has been given weights.

    Servers are started by the first process of each node. ``say`` tells people what happens to them; None on processes
    other than the main one.

    Collectives: creates a group and meets in it; every process of the world must call it.

    Raises:
        UserError: a server does not start.
    """
    rollout = config.rollout
    if kind == "embedded":
        hf_config = read_hf_config(config.model.path, config.model.revision)
        dtype = DTYPES[rollout.dtype or config.model.dtype]
        return EmbeddedEngine(hf_config, tokenizer, dtype, here.device, rollout.batch_size)
    settings = config.sglang
    architecture = read_architecture(config.model.path, config.model.revision)
    verifier = build_verifier(config, architecture, here.device.type)
    # Every wait of the main process has a limit of its own; the others find out by its closed connection.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    fleet, urls = None, list(settings.urls)
    if not urls:
        plans = plan_servers(config, here.node) if here.leads_node else []
        fleet = Fleet([SglangServer(plan) for plan in plans], group)
        check_nodes(config, fleet.nodes)
        if here.device.type == "cuda":
            torch.cuda.empty_cache()  # loading a checkpoint leaves memory that the servers may need
        urls = fleet.start(settings.start_timeout_s)
    clients = make_clients(config, architecture, urls, settings.concurrency) if here.is_main else []
    transport = build_transport(config, here.device.type) if here.is_main else None
    options = EngineOptions(
        settings.concurrency, settings.attempts, settings.start_timeout_s, settings.pause, settings.release_memory
    )
    return SglangEngine(clients, fleet, transport, tokenizer, options, group, verifier if here.is_main else None, say)


def take_folder_weights(engine: RolloutEngine, config: Config) -> None:
    """Have an engine sample with the weights of ``config.model``'s own folder, as version 0.

    Collectives: those of ``RolloutEngine.update_weights``.

    Raises:
        UserError: the folder's weights are not the model's, or hold NaN.
    """
    architecture = read_architecture(config.model.path, config.model.revision)
    reader = TensorReader(resolve_folder(config.model.path, config.model.revision))
    names = model_tensors(architecture, reader)
    bucket_bytes = int(config.rollout.bucket_mb * _MIB)
    engine.update_weights(lambda: in_buckets(((name, _finite(reader, name)) for name in names), bucket_bytes), 0)


def _finite(reader: TensorReader, name: str) -> torch.Tensor:
    tensor = reader.get(name)
    if not tensor.isfinite().all():
        rule = "this tensor holds NaN or infinity"
        raise UserError(describe(reader.origin, name, rule, "Restore the model's files."))
    return tensor


def make_clients(
    config: Config, architecture: Architecture, urls: Sequence[str], connections: int
) -> list[SglangClient]:
    """Return a client for each address."""
    limits = Limits(architecture.vocab_size, architecture.max_positions)
    settings = config.sglang
    patience = settings.request_timeout_s, connections, settings.silence_timeout_s
    return [SglangClient(url, limits, *patience) for url in urls]


def build_transport(config: Config, device_type: str) -> Transport:
    """Return what brings the weights to the servers."""
    settings = config.sglang
    if settings.transport == "tensor":
        return TensorTransport(settings.tensor, settings.sync_timeout_s)
    if settings.transport == "distributed":
        backend = "nccl" if device_type == "cuda" else "gloo"
        return DistributedTransport(settings.tensor, backend, settings.sync_timeout_s)
    if settings.transport == "disk":
        model = resolve_folder(config.model.path, config.model.revision)
        return DiskTransport(_weights_folder(config), model, settings.sync_timeout_s)
    assert_never(settings.transport)


def _weights_folder(config: Config) -> Path:
    """Folder of the disk transport: the run's own, and the same each time: what a killed run left is cleared away."""
    run = Path(config.run.dir).absolute()
    if config.sglang.folder is None:
        return RunFolder(run).weights
    digest = hashlib.blake2b(str(run).encode(), digest_size=4).hexdigest()
    return Path(config.sglang.folder) / f"copsd-{run.name}-{digest}"


def build_verifier(config: Config, architecture: Architecture, device_type: str) -> Verifier | None:
    """Return what looks at the servers' weights after every sync.

    Raises:
        UserError: the model is one that has no checksums.
    """
    settings = config.sglang
    if settings.verify == "off":
        return None
    if settings.verify == "logprobs":
        return ProbeLogProbs(settings.verify_limit)
    if architecture.experts:
        rule = "servers rearrange the weights of experts, so that checksums can't be compared"
        raise UserError(describe("sglang.verify", settings.verify, rule, "Set logprobs."))
    on_gpu = bool(settings.devices) or (bool(settings.urls) and device_type == "cuda")
    dtype = DTYPES[config.rollout.dtype or config.model.dtype]
    return WeightChecksums(settings.tensor, architecture.kv_groups, dtype, on_gpu)
