"""What the tests with real SGLang servers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch.distributed as dist
from processes import PATIENCE
from sglang_servers import family, make_client, own_engine, plan_of
from small_tokenizer import small_tokenizer
from tiny import make_model, settings, write_config

from megatron_copsd.rollout.sglang.engine import EngineOptions, SglangEngine, Transport, Verifier
from megatron_copsd.rollout.sglang.process import SglangServer, start_all

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
    with ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(
            closing(own_engine(config, model, tmp_path, *arguments, **options))
        )


@pytest.fixture(scope="module")
def engine(config: Path, model: Path, group: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangEngine]:
    """An engine with a server of its own, which each test leaves in working order, and which leaves nothing behind."""
    with closing(own_engine(config, model, tmp_path_factory.mktemp("engine"))) as engine:
        yield engine
        leader = engine.fleet.own[0].pid
        assert family(leader)
    assert not family(leader)


@pytest.fixture(scope="session")
def served(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server for all tests that do no harm to it; each brings the weights that it wants there."""
    server = SglangServer(plan_of(config, tmp_path_factory.mktemp("served")))
    start_all([server], PATIENCE)
    yield server.url
    server.stop()


@pytest.fixture
def attach_engine(served: str, model: Path, group: None) -> Iterator[Callable[..., SglangEngine]]:
    """Makes an engine of the shared server."""
    with ExitStack() as stack:

        def attach(transport: Transport, verifier: Verifier | None = None, pause: str = "wait") -> SglangEngine:
            options = EngineOptions(concurrency=8, attempts=2, start_seconds=PATIENCE, pause=pause)
            clients = [make_client(served, model)]
            engine = SglangEngine(clients, None, transport, small_tokenizer(), options, verifier=verifier)
            return stack.enter_context(closing(engine))

        yield attach
