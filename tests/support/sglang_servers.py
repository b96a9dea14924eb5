"""Servers, clients and weights for the tests with real SGLang servers, and a look at their processes."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from processes import PATIENCE
from small_tokenizer import small_tokenizer

from megatron_copsd.config.load import load_config
from megatron_copsd.engines import build_transport
from megatron_copsd.hf.folder import TensorReader
from megatron_copsd.hf.read import read_architecture
from megatron_copsd.rollout.engine import Bucket, WeightSource
from megatron_copsd.rollout.sglang.client import Limits, SglangClient
from megatron_copsd.rollout.sglang.engine import EngineOptions, SglangEngine
from megatron_copsd.rollout.sglang.fleet import Fleet
from megatron_copsd.rollout.sglang.process import ServerPlan, SglangServer, plan_servers
from megatron_copsd.sync.buckets import in_buckets

# Every step's rollouts are compared with the trainer, whose weights have moved: a sync that left anything out stops it.
CHECKED = ("rollout.agreement_every=1", "rollout.agreement_limit=1e-4", "rollout.agreement_failure=stop")


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


def own_engine(
    config: Path,
    model: Path,
    folder: Path,
    transport: str = "disk",
    servers: int = 1,
    pause: str = "wait",
    silence_seconds: float = PATIENCE,
) -> SglangEngine:
    """An engine with servers of its own, which log into ``folder``."""
    loaded = load_config(str(config), [f"run.dir={folder}", f"sglang.transport={transport}"]).config
    plans = [
        plan_of(config, folder, log=folder / f"sglang_{number}.log", silence_seconds=silence_seconds)
        for number in range(servers)
    ]
    fleet = Fleet([SglangServer(plan) for plan in plans], None)
    clients = [make_client(url, model) for url in fleet.start(PATIENCE)]
    options = EngineOptions(concurrency=8, attempts=2, start_seconds=PATIENCE, pause=pause)
    return SglangEngine(clients, fleet, build_transport(loaded, "cpu"), small_tokenizer(), options)


def wait_until_sampling(url: str, looks: int = 400) -> bool:
    """Return whether a server has a request under way, looking so often; a batch may end between two looks."""
    for _ in range(looks):
        if httpx.get(f"{url}/v1/loads", trust_env=False).json()["loads"][0]["num_running_reqs"]:
            return True
        time.sleep(0.05)
    return False


def make_client(url: str, model: Path) -> SglangClient:
    architecture = read_architecture(str(model), None)
    return SglangClient(url, Limits(architecture.vocab_size, architecture.max_positions), PATIENCE, 16)


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
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
