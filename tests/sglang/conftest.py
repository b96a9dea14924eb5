"""What the tests with real SGLang servers share."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from small_tokenizer import small_tokenizer
from tiny import make_model, settings, write_config

from megatron_copsd.config.load import load_config
from megatron_copsd.engines import build_transport
from megatron_copsd.hf.architecture import read_architecture
from megatron_copsd.hf.folder import TensorReader
from megatron_copsd.rollout.engine import Bucket, WeightSource
from megatron_copsd.rollout.sglang_client import Limits, SglangClient
from megatron_copsd.rollout.sglang_engine import EngineOptions, SglangEngine
from megatron_copsd.rollout.sglang_server import ServerPlan, SglangServer, plan_servers, start_all
from megatron_copsd.sync.buckets import in_buckets

CACHE_TOKENS = 8192


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3 in float32."""
    return make_model(tmp_path_factory.mktemp("sglang") / "model")


@pytest.fixture(scope="session")
def config(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose rollouts come from a server."""
    folder = tmp_path_factory.mktemp("config")
    sections = {"rollout": {"engine": "sglang"}, "sglang": {"max_total_tokens": CACHE_TOKENS}}
    return write_config(folder, settings(folder, model, **sections))


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone, which the engine broadcasts in."""
    rendezvous = tmp_path_factory.mktemp("group") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def plan_of(config: Path, run: Path, **changes: object) -> ServerPlan:
    """How to start the configuration's server, logging into ``run``."""
    (plan,) = plan_servers(load_config(str(config), [f"run.dir={run}"]).config)
    return dataclasses.replace(plan, **changes)


def weights(model: Path) -> WeightSource:
    """The weights of a folder, as the trainer would hand them over."""
    reader = TensorReader(model)

    def source() -> Iterator[Bucket]:
        return in_buckets(((name, reader.get(name)) for name in sorted(reader.names())), 1 << 16)

    return source


def make_client(url: str, model: Path, request_seconds: float = 120.0) -> SglangClient:
    architecture, _ = read_architecture(str(model), None)
    return SglangClient(url, Limits(architecture.vocab_size, architecture.max_positions), request_seconds, 16)


@pytest.fixture
def start_engine(config: Path, model: Path, group: None, tmp_path: Path) -> Iterator[Callable[..., SglangEngine]]:
    """Starts an engine with a server of its own, and ends both after the test."""
    engines: list[SglangEngine] = []

    def start(transport: str = "disk", request_seconds: float = 120.0) -> SglangEngine:
        loaded = load_config(str(config), [f"run.dir={tmp_path}", f"sglang.transport={transport}"]).config
        server = SglangServer(plan_of(config, tmp_path))
        start_all([server], 300)
        client = make_client(server.url, model, request_seconds)
        options = EngineOptions(concurrency=8, attempts=2, start_seconds=300)
        engine = SglangEngine([client], [server], build_transport(loaded, "cpu"), small_tokenizer(), options)
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.close()


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def family(leader: int) -> list[int]:
    """Living processes of a server: those in the process group that its main process leads."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and alive(int(entry.name)):
            try:
                if os.getpgid(int(entry.name)) == leader:
                    found.append(int(entry.name))
            except ProcessLookupError:
                continue
    return found
