"""A trainer that is killed while it broadcasts weights to its server; run by test_faults.py."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from processes import PATIENCE
from sglang_servers import family, make_client, plan_of, weights

from megatron_copsd.rollout.engine import Bucket
from megatron_copsd.rollout.sglang.process import SglangServer, start_all
from megatron_copsd.sync.distributed import DistributedTransport

config, model, folder = map(Path, sys.argv[1:])
dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=0, world_size=1)
server = SglangServer(plan_of(config, folder))
start_all([server], PATIENCE)
(folder / "family").write_text(" ".join(map(str, family(server.pid))), encoding="ascii")


def dying() -> Iterator[Bucket]:
    for number, bucket in enumerate(weights(model)()):
        yield bucket
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)


DistributedTransport(1, "gloo", PATIENCE).push(dying(), 1, [make_client(server.url, model)])
