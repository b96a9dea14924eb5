"""What the tests with real SGLang servers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from sglang_servers import make_client, plan_of
from small_tokenizer import small_tokenizer
from tiny import make_model, settings, write_config

from megatron_copsd.config.load import load_config
from megatron_copsd.engines import build_transport
from megatron_copsd.rollout.sglang.engine import EngineOptions, SglangEngine, Verifier
from megatron_copsd.rollout.sglang.fleet import Fleet
from megatron_copsd.rollout.sglang.process import SglangServer

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


@pytest.fixture
def start_engine(config: Path, model: Path, group: None, tmp_path: Path) -> Iterator[Callable[..., SglangEngine]]:
    """Starts an engine with a server of its own, and ends both after the test."""
    engines: list[SglangEngine] = []

    def start(
        transport: str = "disk",
        request_seconds: float = 120.0,
        servers: int = 1,
        verifier: Verifier | None = None,
        pause: str = "wait",
    ) -> SglangEngine:
        loaded = load_config(str(config), [f"run.dir={tmp_path}", f"sglang.transport={transport}"]).config
        # What is silent for longer hangs: all batches here are small.
        changes = {"silence_seconds": 20.0}
        plans = [plan_of(config, tmp_path, log=tmp_path / f"sglang_{n}.log", **changes) for n in range(servers)]
        fleet = Fleet([SglangServer(plan) for plan in plans], None)
        clients = [make_client(url, model, request_seconds) for url in fleet.start(300)]
        options = EngineOptions(concurrency=8, attempts=2, start_seconds=300, pause=pause)
        engine = SglangEngine(
            clients, fleet, build_transport(loaded, "cpu"), small_tokenizer(), options, verifier=verifier
        )
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.close()
