"""What the transports that update weights in place have in common."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from megatron_copsd.errors import UserError
from megatron_copsd.rollout.sglang.client import SglangClient


def begin_updates(clients: Sequence[SglangClient], seconds: float, pool: ThreadPoolExecutor) -> None:
    """Have all servers begin to take weights; one that a push before this left in the middle begins anew.

    Raises:
        ServerLost: a server went away.
    """

    def begin(client: SglangClient) -> None:
        with suppress(UserError):  # there was nothing to end
            client.call("/end_weight_update", {}, seconds)
        client.call("/begin_weight_update", {}, seconds)

    list(pool.map(begin, clients))


def end_updates(clients: Sequence[SglangClient], seconds: float, pool: ThreadPoolExecutor) -> None:
    """Have all servers use what they were given.

    Raises:
        ServerLost: a server went away.
    """
    list(pool.map(lambda client: client.call("/end_weight_update", {}, seconds), clients))
