"""An SGLang server as a child process: started with the flags its device needs, watched, stopped, never orphaned.

The server lives in a Python environment of its own (``make sglang``); this module knows its command line and no more.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socket import socket
from typing import IO

import httpx
import torch

from megatron_copsd.config.paths import why_no_file
from megatron_copsd.config.schema import Config
from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.folder import resolve_folder
from megatron_copsd.records.paths import RunFolder
from megatron_copsd.rollout.sglang import cpu_stand_ins
from megatron_copsd.rollout.sglang.ports import address_towards, is_free, listens, reserve_port
from megatron_copsd.signals import end_with_parent

_POLL_SECONDS = 0.5
_READY_SECONDS = 5.0
_STOP_SECONDS = 15.0
_LOG_LINES = 12
_STARTS = 2
_PORTS = 5
_PORT_TAKEN = "address already in use"

# What a launcher of trainers puts into the environment would make the server join the trainers' process group.
_TRAINER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@dataclass(frozen=True)
class ServerPlan:
    """How to start one server.

    Attributes:
        python: interpreter of SGLang's environment.
        model: folder of the model; its weights are replaced at the first weight sync.
        dtype: float32 or bfloat16.
        host: address to listen on.
        port: 0 for any free one.
        tensor: tensor-parallel size of the server.
        devices: CUDA devices it may see; empty for a CPU server.
        memory_fraction: of device memory for weights and cache.
        max_total_tokens: tokens in the cache; None leaves it to the server.
        log: file that its output is appended to.
        release_memory: whether it must be able to give up its device memory for a while.
        extra_arguments: further arguments of ``sglang.launch_server``.
        silence_seconds: longest time that its scheduler may be busy with one batch.
    """

    python: Path
    model: str
    dtype: str
    host: str
    port: int
    tensor: int
    devices: tuple[int, ...]
    memory_fraction: float
    max_total_tokens: int | None
    log: Path
    release_memory: bool = False
    extra_arguments: tuple[str, ...] = ()
    silence_seconds: float = 120.0


class ServerEnded(UserError):
    """The server ended before it was ready."""


class PortTaken(ServerEnded):
    """It ended because another program took a port first: its own, or one that SGLang chose for its processes."""


class SglangServer:
    """One server process; start, watch, stop."""

    def __init__(self, plan: ServerPlan) -> None:
        """Nothing is started yet."""
        self.plan = plan
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._log_start = 0
        self._port = 0
        self._reservation: socket | None = None

    @property
    def is_alive(self) -> bool:
        """Whether the main process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the main process, which leads the process group of all that the server starts."""
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> None:
        """Start the process; ``wait_until_ready`` must follow.

        Raises:
            UserError: the port is taken.
        """
        plan = self.plan
        if plan.port and not is_free(plan.host, plan.port):
            rule = f"another program listens on it ({plan.host})"
            raise UserError(describe("sglang.port", plan.port, rule, "End that one, choose another, or 0 for any."))
        self._reservation = None if plan.port else reserve_port(plan.host)
        self._port = self._reservation.getsockname()[1] if self._reservation else plan.port
        self.url = f"http://{plan.host}:{self._port}"
        plan.log.parent.mkdir(parents=True, exist_ok=True)
        self._log = plan.log.open("ab")
        self._log_start = self._log.tell()
        self._process = subprocess.Popen(
            server_command(plan, self._port),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=server_environment(plan, os.environ),
            # A group of its own: its children are reached through it, and the terminal's Ctrl-C is the trainer's.
            start_new_session=True,
            # However the trainer ends, the server is told to, and ends its own.
            preexec_fn=partial(end_with_parent, by=signal.SIGTERM),
        )

    def wait_until_ready(self, seconds: float) -> None:
        """Wait until the server takes requests.

        Whoever else answers at its address is not waited for: the server finds the port taken and ends.

        Raises:
            UserError: it ended, or was not ready in time; it is stopped then.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.is_alive:
                code = self._process.poll() if self._process else None
                self.stop()
                kind = PortTaken if _PORT_TAKEN in self._said().lower() else ServerEnded
                raise kind(self._complaint(f"the server ended with exit code {code} before it was ready"))
            if self.is_ready() and listens(self.pid, self._port):
                return
            time.sleep(_POLL_SECONDS)
        self.stop()
        raise UserError(self._complaint(f"the server was not ready within {seconds:g} s (sglang.start_timeout_s)"))

    def is_ready(self) -> bool:
        """Whether it says that it takes requests."""
        with suppress(httpx.HTTPError):  # it does not listen before it is ready
            return httpx.get(f"{self.url}/ready", timeout=_READY_SECONDS, trust_env=False).is_success
        return False

    def hangs(self) -> bool:
        """Whether its scheduler says nothing for ``plan.silence_seconds``; returns as soon as it says something."""
        try:
            httpx.get(f"{self.url}/server_info", timeout=self.plan.silence_seconds, trust_env=False)
        except httpx.ReadTimeout:
            return True
        except httpx.HTTPError:
            pass  # it ends, or has ended: that is found out otherwise
        return False

    def stop(self) -> None:
        """End the server and everything it started; it may finish what it is doing for a few seconds."""
        if self._process is None:
            return
        if self.is_alive:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):  # killed below
                self._process.wait(_STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End the server and everything it started, at once."""
        if self._reservation is not None:
            self._reservation.close()
        process, self._process = self._process, None  # more than one watch may find that it hangs
        if process is None:
            return
        with suppress(ProcessLookupError):  # all gone already
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if self._log is not None:
            self._log.close()

    def _said(self) -> str:
        """What it logged since it was started."""
        return self.plan.log.read_bytes()[self._log_start :].decode("utf-8", errors="replace")

    def _complaint(self, rule: str) -> str:
        shown = "\n".join(f"    {line}" for line in self._said().splitlines()[-_LOG_LINES:])
        text = describe("sglang", self.plan.model, rule, f"Its log, {self.plan.log}, ends with:")
        return f"{text}\n{shown}"


def default_python() -> Path:
    """Interpreter of the environment that ``make sglang`` makes: COPSD_SGLANG_ENV, or a folder of the user's cache."""
    folder = Path(os.environ.get("COPSD_SGLANG_ENV") or "~/.cache/megatron_copsd/sglang").expanduser()
    return folder / "bin" / "python"


def plan_servers(config: Config, node: int = 0) -> list[ServerPlan]:
    """Return how to start a configuration's servers on this machine, the run's ``node``-th.

    Raises:
        UserError: SGLang's environment is not there, or the settings name none of this machine's GPUs.
    """
    settings = config.sglang
    if not settings.devices and torch.cuda.is_available():
        rule = "the servers would run on the CPU of a machine that has GPUs"
        remedy = "List their devices; to run them on the CPU all the same, set CUDA_VISIBLE_DEVICES to nothing."
        raise UserError(describe("sglang.devices", [], rule, remedy))
    python = Path(settings.python) if settings.python else default_python()
    if found := why_no_file(python):
        remedy = "Run make sglang, or name the interpreter of an environment that has SGLang."
        raise UserError(describe("sglang.python", str(python), found, remedy))
    return [
        ServerPlan(
            python=python,
            model=str(resolve_folder(config.model.path, config.model.revision)),
            dtype=config.rollout.dtype or config.model.dtype,
            host=_node_address() if settings.host == "auto" else settings.host,
            port=settings.port + index if settings.port else 0,
            tensor=settings.tensor,
            devices=settings.devices[index * settings.tensor : (index + 1) * settings.tensor],
            memory_fraction=settings.memory_fraction,
            max_total_tokens=settings.max_total_tokens,
            log=RunFolder(Path(config.run.dir)).server_log(node * settings.servers + index),
            release_memory=settings.release_memory,
            extra_arguments=settings.extra_arguments,
            silence_seconds=settings.silence_timeout_s,
        )
        for index in range(settings.servers)
    ]


def server_command(plan: ServerPlan, port: int) -> list[str]:
    """Return the command line of the server for its device."""
    command = [str(plan.python), "-m", "sglang.launch_server", "--model-path", plan.model, "--dtype", plan.dtype]
    command += ["--host", plan.host, "--port", str(port), "--tp-size", str(plan.tensor)]
    command += ["--mem-fraction-static", str(plan.memory_fraction), "--skip-tokenizer-init", "--skip-server-warmup"]
    command += ["--sampling-defaults", "openai"]  # not what the model's generation_config.json would have
    if plan.max_total_tokens is not None:
        command += ["--max-total-tokens", str(plan.max_total_tokens)]
    if plan.release_memory:
        command.append("--enable-memory-saver")
    if not plan.devices:
        command += ["--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
        # An idle scheduler would otherwise spin on a core that the trainer needs.
        command += ["--disable-cuda-graph", "--disable-overlap-schedule", "--sleep-on-idle"]
    return [*command, *plan.extra_arguments]


def server_environment(plan: ServerPlan, ours: Mapping[str, str]) -> dict[str, str]:
    """Return a server's environment, given the trainer's.

    Raises:
        UserError: the server is to have a device that the trainer does not see.
    """
    environment = {name: value for name, value in ours.items() if not _is_trainers(name)}
    # Its environment is installed without bytecode: what is imported is compiled once, not at every start.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    if Path(plan.model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if not plan.devices:
        paths = (str(Path(cpu_stand_ins.__file__).parent), environment.get("PYTHONPATH"))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(_device_names(plan.devices, ours.get("CUDA_VISIBLE_DEVICES")))
    if plan.release_memory:
        # The server's memory saver refuses to start under expandable segments.
        environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)
        environment.pop("PYTORCH_ALLOC_CONF", None)
    return environment


def _device_names(devices: Sequence[int], visible: str | None) -> list[str]:
    """Names of devices that are numbered as this process sees them."""
    if not visible:
        return [str(device) for device in devices]
    names = visible.split(",")
    unseen = [device for device in devices if device >= len(names)]
    if unseen:
        rule = f"must be below {len(names)}, the devices that CUDA_VISIBLE_DEVICES={visible} leaves"
        raise UserError(describe("sglang.devices", unseen[0], rule, "Correct one of the two."))
    return [names[device] for device in devices]


def _node_address() -> str:
    """Address of this machine on the way to the run's first node; without a run, on the way out."""
    # No packet is sent; 192.0.2.1 is of a network that is nowhere (RFC 5737).
    return address_towards(os.environ.get("MASTER_ADDR", "192.0.2.1"), int(os.environ.get("MASTER_PORT", "9")))


def _is_trainers(name: str) -> bool:
    return name in _TRAINER_VARIABLES or name.startswith(("TORCHELASTIC_", "PET_"))


def start_all(servers: Sequence[SglangServer], seconds: float) -> None:
    """Start servers side by side and wait for all; one that ends instead is tried a few times.

    On a busy machine SGLang's own start-up checks time out now and then, and it ends; and SGLang chooses ports for its
    processes before they listen there, so that others may come first.

    Raises:
        UserError: one did not become ready; all are stopped then.
    """
    try:
        for server in servers:
            server.start()
        for server in servers:
            _wait(server, seconds)
    except BaseException:
        stop_all(servers)
        raise


def stop_all(servers: Sequence[SglangServer]) -> None:
    """Stop servers side by side."""
    with ThreadPoolExecutor(max_workers=max(1, len(servers))) as pool:
        list(pool.map(SglangServer.stop, servers))


def _wait(server: SglangServer, seconds: float) -> None:
    tries = {ServerEnded: _STARTS, PortTaken: _PORTS}
    while True:
        try:
            return server.wait_until_ready(seconds)
        except ServerEnded as error:
            tries[type(error)] -= 1
            if not tries[type(error)]:
                raise
        server.start()
