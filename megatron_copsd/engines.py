"""The rollout engine and the weight transport that a configuration asks for."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from megatron_copsd import platform
from megatron_copsd.config.schema import Config
from megatron_copsd.hf.architecture import Architecture
from megatron_copsd.hf.folder import resolve_folder
from megatron_copsd.platform import DTYPES
from megatron_copsd.rollout.embedded import EmbeddedEngine
from megatron_copsd.rollout.engine import RolloutEngine
from megatron_copsd.rollout.sglang_client import Limits, SglangClient
from megatron_copsd.rollout.sglang_engine import EngineOptions, SglangEngine, Transport
from megatron_copsd.rollout.sglang_server import SglangServer, plan_servers, start_all
from megatron_copsd.sync.disk import DiskTransport
from megatron_copsd.sync.distributed import DistributedTransport
from megatron_copsd.sync.tensor import TensorTransport


def build_engine(
    config: Config,
    hf_config: PretrainedConfig,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    here: platform.Platform,
) -> RolloutEngine:
    """Return this process's part of the engine; servers are started by the main process alone.

    Raises:
        UserError: a server does not start, or none is at an address given.
    """
    rollout = config.rollout
    if rollout.engine == "embedded" or config.objective.name == "sft":
        dtype = DTYPES[rollout.dtype or config.model.dtype]
        return EmbeddedEngine(hf_config, tokenizer, dtype, here.device, rollout.batch_size)
    settings = config.sglang
    options = EngineOptions(settings.concurrency, settings.attempts, settings.start_timeout_s, settings.release_memory)
    if not here.is_main:
        return SglangEngine((), (), None, tokenizer, options)
    servers, clients = start_clients(config, architecture, settings.concurrency)
    return SglangEngine(clients, servers, build_transport(config, here.device.type), tokenizer, options)


def start_clients(
    config: Config, architecture: Architecture, connections: int
) -> tuple[list[SglangServer], list[SglangClient]]:
    """Return clients of the servers that ``sglang.urls`` names, or of servers started here, which come first.

    Raises:
        UserError: a server does not start.
    """
    settings = config.sglang
    servers = [] if settings.urls else [SglangServer(plan) for plan in plan_servers(config)]
    start_all(servers, settings.start_timeout_s)
    limits = Limits(architecture.vocab_size, architecture.max_positions)
    urls = settings.urls or [server.url for server in servers]
    return servers, [SglangClient(url, limits, settings.request_timeout_s, connections) for url in urls]


def build_transport(config: Config, device_type: str) -> Transport:
    """Return what brings the weights to the servers."""
    settings = config.sglang
    if settings.transport == "tensor":
        return TensorTransport(settings.tensor, settings.sync_timeout_s)
    if settings.transport == "distributed":
        backend = "nccl" if device_type == "cuda" else "gloo"
        return DistributedTransport(settings.trainer_host, settings.tensor, backend, settings.sync_timeout_s)
    folder = Path(settings.folder) if settings.folder else Path(config.run.dir) / "weights"
    return DiskTransport(folder, resolve_folder(config.model.path, config.model.revision), settings.sync_timeout_s)
