"""The servers that sample where rollout.engine is sglang."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from megatron_copsd.config.settings import (
    Count,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Problem,
    Processes,
    Seconds,
    Settings,
    without_effect,
)
from megatron_copsd.errors import UserError, describe

if TYPE_CHECKING:
    from megatron_copsd.config.schema import Config

KEPT_POSITIONS = 2  # a response that reaches into the model's last ones is cut short by a server without a word


class SglangSettings(Settings):
    """The SGLang servers that sample where rollout.engine is sglang."""

    urls: tuple[str, ...] = Field(
        default=(), description="servers that run already; the trainer starts its own when empty"
    )
    servers: Processes = Field(default=1, description="servers to start on each of the trainer's nodes")
    python: PathText | None = Field(
        default=None, description="interpreter of SGLang's environment; the one of make sglang if null"
    )
    host: str = Field(
        default="127.0.0.1",
        description="address that our servers listen on, and are reached at; auto: each node's own in the trainer's "
        "network, which several nodes need",
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=0, description="port of our first server; 0 takes free ones"
    )
    tensor: Processes = Field(default=1, description="tensor-parallel size of each server")
    devices: tuple[NonNegativeInt, ...] = Field(
        default=(),
        description="CUDA devices of a node's servers, sglang.servers x sglang.tensor of them; empty: on the CPU, "
        "where there is no GPU",
    )
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.2, description="share of memory for weights and cache (more where the device is the server's alone)"
    )
    release_memory: bool = Field(
        default=False, description="servers on the trainer's own devices: they give up their memory while it trains"
    )
    max_total_tokens: PositiveInt | None = Field(
        default=None, description="tokens in the cache; the server decides if null"
    )
    extra_arguments: tuple[str, ...] = Field(default=(), description="further arguments of sglang.launch_server")
    transport: Literal["disk", "distributed", "tensor"] = Field(
        default="disk",
        description="weights go through files, a process group (NCCL, Gloo), or shared memory (one machine)",
    )
    folder: PathText | None = Field(
        default=None, description="where the disk transport makes its folder, seen by all servers; run.dir if null"
    )
    pause: Literal["wait", "retract", "in_place"] = Field(
        default="wait",
        description="new weights while responses are sampled (rollout.ahead: 1): wait: those are finished before; "
        "retract: they go on under the new weights, keys and values computed anew; in_place: with those of the old",
    )
    verify: Literal["checksum", "logprobs", "off"] = Field(
        default="off",
        description="after every sync, compare each server's weights with the trainer's: checksum: bits (dense models, "
        "neither quantised nor packed); logprobs: what both say of a few prompts, within sglang.verify_limit",
    )
    verify_limit: PositiveFloat = Field(
        default=0.1, description="verify logprobs: largest mean difference of a token's log-probability, in nats"
    )
    concurrency: Count = Field(default=64, description="requests at a server at once")
    attempts: PositiveInt = Field(default=4, description="times that a request, a sync or a lost server is tried")
    request_timeout_s: Seconds = Field(default=600.0, description="longest wait for one response")
    silence_timeout_s: Seconds = Field(
        default=120.0, description="longest time that a server may be busy with one batch before it is taken for hung"
    )
    start_timeout_s: Seconds = Field(default=600.0, description="longest wait for a server to become ready")
    sync_timeout_s: Seconds = Field(
        default=300.0, description="longest wait for a server to take one bucket of weights"
    )


def problems(config: Config) -> list[Problem]:
    """Return what is wrong with this section in the light of the others."""
    if config.rollout.engine != "sglang":
        return []
    return [*_server_problems(config.sglang), *_sync_problems(config)]


def idle(config: Config) -> list[Problem]:
    """Return what has no effect and is said, not refused: settings of servers in a run that has none, or not such."""
    sglang = config.sglang
    if not config.trains_with_servers:
        rule = "in training with rollout.engine = embedded"
        if config.rollout.engine == "sglang":
            rule = f"in training with objective.name = {config.method.name}, which samples no responses"
        return without_effect(
            "sglang", sglang, SglangSettings.model_fields, rule, "Remove it, or leave it for servers."
        )
    found: list[Problem] = []
    if sglang.urls:
        names = ["servers", "python", "host", "port", "memory_fraction", "max_total_tokens", "extra_arguments"]
        found += without_effect("sglang", sglang, names, "on servers that run already (sglang.urls)")
    if sglang.transport != "disk":
        found += without_effect("sglang", sglang, ["folder"], f"with sglang.transport = {sglang.transport}")
    if sglang.verify != "logprobs":
        found += without_effect("sglang", sglang, ["verify_limit"], f"with sglang.verify = {sglang.verify}")
    return found


def check_nodes(config: Config, nodes: int) -> None:
    """Refuse what servers of our own can't do on several nodes.

    Raises:
        UserError: as said.
    """
    sglang = config.sglang
    if nodes == 1 or sglang.urls or not config.trains_with_servers:
        return
    if sglang.host != "auto":
        rule = f"the run has {nodes} nodes, and each node's servers need an address of their own"
        raise UserError(describe("sglang.host", sglang.host, rule, "Set auto."))
    if sglang.transport == "tensor":
        rule = f"the run has {nodes} nodes, which share no memory"
        raise UserError(describe("sglang.transport", sglang.transport, rule, "Set disk or distributed."))


def _server_problems(sglang: SglangSettings) -> list[Problem]:
    """Servers and their devices."""
    found: list[Problem] = []
    if sglang.urls and sglang.devices:
        rule = "servers that run already have chosen their devices (sglang.urls)"
        found.append(Problem("sglang.devices", list(sglang.devices), rule, "Remove one of the two."))
    if sglang.urls and sglang.transport == "tensor":
        rule = "memory is shared with servers of our own only, and sglang.urls names others"
        found.append(Problem("sglang.transport", sglang.transport, rule, "Set disk or distributed."))
    if sglang.devices and len(sglang.devices) != sglang.servers * sglang.tensor:
        rule = f"must name sglang.servers x sglang.tensor = {sglang.servers} x {sglang.tensor} devices"
        found.append(Problem("sglang.devices", list(sglang.devices), rule, "List that many."))
    if not sglang.devices and sglang.tensor > 1 and not sglang.urls:
        rule = "a server on the CPU takes 1"
        found.append(Problem("sglang.tensor", sglang.tensor, rule, "Set 1, or name devices."))
    if sglang.release_memory and not sglang.devices:
        rule = "is for servers of our own on the trainer's devices (sglang.devices)"
        found.append(Problem("sglang.release_memory", True, rule, "Set false, or name devices."))
    for url in sglang.urls:
        if not url.startswith(("http://", "https://")):
            found.append(Problem("sglang.urls", url, "must be http://HOST:PORT", "Write the whole address."))
    return found


def _sync_problems(config: Config) -> list[Problem]:
    """New weights, and what servers do meanwhile."""
    found: list[Problem] = []
    rollout, sglang = config.rollout, config.sglang
    if sglang.transport == "distributed" and sglang.sync_timeout_s >= config.parallel.timeout_s:
        rule = f"must be below parallel.timeout_s = {config.parallel.timeout_s:g}, as the trainer waits in a collective"
        found.append(Problem("sglang.sync_timeout_s", sglang.sync_timeout_s, rule, "Lower it, or raise the other."))
    if sglang.pause != "wait" and not rollout.ahead:
        rule = "nothing is being sampled at a weight sync unless rollout.ahead is 1"
        found.append(Problem("sglang.pause", sglang.pause, rule, "Set wait, or rollout.ahead: 1."))
    if sglang.pause != "wait" and sglang.verify == "logprobs":
        rule = f"servers that are paused answer no prompts (sglang.pause: {sglang.pause})"
        found.append(Problem("sglang.verify", sglang.verify, rule, "Set checksum, or sglang.pause: wait."))
    if sglang.release_memory and rollout.ahead:
        rule = "with rollout.ahead the servers work while the trainer does"
        found.append(Problem("sglang.release_memory", True, rule, "Set one of the two."))
    if sglang.release_memory and sglang.transport == "distributed":
        rule = "NCCL takes no two processes on one device into a group, and servers share the trainer's"
        found.append(Problem("sglang.transport", sglang.transport, rule, "Set tensor or disk."))
    return found
