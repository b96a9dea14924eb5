"""Ports of SGLang servers: lost to another program between choice and use, found again; a stand-in plays the server."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from megatron_copsd.errors import UserError
from megatron_copsd.rollout.sglang.process import ServerPlan, SglangServer, start_all

# Listens when its model is loaded, and ends where it cannot, as SGLang does.
STAND_IN = """
    import sys
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"the server")

        def log_message(self, *_):
            pass

    host, port = (sys.argv[sys.argv.index(flag) + 1] for flag in ("--host", "--port"))
    try:
        server = HTTPServer((host, int(port)), Handler)
    except OSError as error:
        sys.exit(f"ERROR: [Errno {error.errno}] error while attempting to bind on address: address already in use")
    server.serve_forever()
"""


class SomebodyElse(BaseHTTPRequestHandler):
    """Says yes to everything."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"somebody else")

    def log_message(self, *_: object) -> None:
        return None


@pytest.fixture
def plan(tmp_path: Path) -> ServerPlan:
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\n{textwrap.dedent(STAND_IN)}", encoding="utf-8")
    python.chmod(0o755)
    return ServerPlan(
        python=python, model="model", dtype="float32", host="127.0.0.1", port=0, tensor=1, devices=(),
        memory_fraction=0.5, max_total_tokens=None, log=tmp_path / "log",
    )  # fmt: skip


@pytest.fixture
def before_start(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[int], None]]:
    """What happens to the port that a server is told, just before its process starts: one call a start."""
    events: list[Callable[[int], None]] = []
    start = subprocess.Popen

    def hooked(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        if events:
            events.pop(0)(int(command[command.index("--port") + 1]))
        return start(command, **options)

    monkeypatch.setattr(subprocess, "Popen", hooked)
    return events


@pytest.fixture
def lose() -> Iterator[Callable[[int], None]]:
    """Has somebody else listen on a port, and say yes to everything."""
    with ExitStack() as stack:

        def take(port: int) -> None:
            rival = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", port), SomebodyElse))
            stack.callback(rival.shutdown)
            Thread(target=rival.serve_forever).start()

        yield take


def test_a_lost_port_is_noticed_and_another_tried(plan: ServerPlan, before_start: list, lose: Callable) -> None:
    lost: list[int] = []
    before_start += [lambda port: (lose(port), lost.append(port))] * 2
    server = SglangServer(plan)
    try:
        start_all([server], 60)
        assert httpx.get(server.url, trust_env=False).text == "the server"
    finally:
        server.stop()
    assert len({*lost, httpx.URL(server.url).port}) == 3


def test_a_lost_port_that_the_user_chose_is_an_error(plan: ServerPlan, before_start: list, lose: Callable) -> None:
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        before_start.append(lose)
        server = SglangServer(dataclasses.replace(plan, port=kept.getsockname()[1]))
        with pytest.raises(UserError, match=r"sglang\.port"):
            start_all([server], 60)
    assert not server.is_alive


def test_a_chosen_port_is_kept_until_it_is_used(plan: ServerPlan, before_start: list) -> None:
    """Who asks for any port is not given it, and who asks for it without SO_REUSEADDR is refused."""

    def attempt(port: int) -> None:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        tried.append(port)

    tried: list[int] = []
    before_start.append(attempt)
    server = SglangServer(plan)
    try:
        start_all([server], 60)
        assert [httpx.URL(server.url).port] == tried
    finally:
        server.stop()
