"""Servers to measure: those of a configuration, started and stopped here, or those that run already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_copsd.config.check import check
from megatron_copsd.config.load import load_config
from megatron_copsd.config.schema import Config
from megatron_copsd.engines import make_clients
from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.read import read_architecture
from megatron_copsd.rollout.sglang.client import SglangClient
from megatron_copsd.rollout.sglang.process import SglangServer, plan_servers, start_all, stop_all


def load_for_servers(path: str, overrides: Sequence[str]) -> Config:
    """Read a configuration as ``copsd train`` does, with ``rollout.engine: sglang``.

    Raises:
        UserError: a setting is wrong.
    """
    loaded = load_config(path, [*overrides, "rollout.engine=sglang"])
    check(loaded)
    return loaded.config


@contextmanager
def running_clients(config: Config, connections: int) -> Iterator[list[SglangClient]]:
    """Clients of the servers that ``sglang.urls`` names, or of servers that are started and stopped here.

    Raises:
        UserError: a server does not start, or none is at an address.
    """
    architecture = read_architecture(config.model.path, config.model.revision)
    servers = [] if config.sglang.urls else [SglangServer(plan) for plan in plan_servers(config)]
    start_all(servers, config.sglang.start_timeout_s)
    urls = config.sglang.urls or [server.url for server in servers]
    clients = make_clients(config, architecture, urls, connections)
    try:
        for client in clients:
            if not client.is_ready():
                rule = "no server takes requests at this address"
                raise UserError(describe("sglang.urls", client.url, rule, "Start one with copsd serve."))
        yield clients
    finally:
        for client in clients:
            client.close()
        stop_all(servers)
