"""Having SGLang servers sample from random prompts, timed by how many requests they have at once."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from copsd_tools.bench.servers.clients import running_clients
from megatron_copsd.config.schema import Config
from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.read import read_architecture
from megatron_copsd.rollout.engine import Request, Sampling
from megatron_copsd.rollout.sglang.client import SglangClient
from megatron_copsd.rollout.sglang.requests import Answers, RequestPool

_WARM_UP_REQUESTS = 2


@dataclass(frozen=True)
class Load:
    """What the servers are asked for: requests at each concurrency, and tokens of each prompt and response."""

    requests: int
    prompt_tokens: int
    response_tokens: int
    seed: int


@dataclass(frozen=True)
class RolloutSpeed:
    """One line of results.

    Attributes:
        model, dtype: what the servers run.
        servers: how many share the requests.
        concurrency: requests at a server at once.
        requests, prompt_tokens: sent, and tokens of each prompt.
        response_tokens: sampled in all; a response may end before its limit.
        seconds: from the first request to the last answer.
        tokens_per_second: sampled tokens over seconds.
    """

    model: str
    dtype: str
    servers: int
    concurrency: int
    requests: int
    prompt_tokens: int
    response_tokens: int
    seconds: float
    tokens_per_second: float


def bench_rollout(config: Config, load: Load, concurrencies: Sequence[int]) -> list[RolloutSpeed]:
    """Have the servers of a configuration sample from random prompts, at each concurrency in turn.

    Raises:
        UserError: a server does not start, refuses, or is lost.
    """
    architecture = read_architecture(config.model.path, config.model.revision)
    settings = config.rollout
    sampling = Sampling(settings.temperature, settings.top_p, settings.top_k, load.response_tokens, stop_ids=())
    draw = random.Random(load.seed)

    def requests(count: int) -> list[Request]:
        """Prompts never seen before: the servers keep what they have computed of a prompt."""
        ids = range(architecture.vocab_size)
        return [Request(tuple(draw.choices(ids, k=load.prompt_tokens)), seed) for seed in range(count)]

    speeds: list[RolloutSpeed] = []
    with running_clients(config, max(concurrencies)) as clients:
        _sample(clients, requests(_WARM_UP_REQUESTS), sampling, 1)
        for concurrency in concurrencies:
            sent = requests(max(load.requests, concurrency * len(clients)))
            tokens, seconds = _sample(clients, sent, sampling, concurrency)
            speeds.append(
                RolloutSpeed(
                    model=config.model.path,
                    dtype=settings.dtype or config.model.dtype,
                    servers=len(clients),
                    concurrency=concurrency,
                    requests=len(sent),
                    prompt_tokens=load.prompt_tokens,
                    response_tokens=tokens,
                    seconds=seconds,
                    tokens_per_second=tokens / seconds,
                )
            )
    return speeds


def rollout_table(speeds: Sequence[RolloutSpeed]) -> Table:
    """The results for the terminal."""
    first = speeds[0]
    title = f"{first.model}, {first.dtype}, {first.servers} server(s), prompts of {first.prompt_tokens} tokens"
    table = Table("concurrency", "requests", "response tokens", "seconds", "tokens/s", "speed-up", title=title)
    for speed in speeds:
        counts = (str(speed.concurrency), str(speed.requests), str(speed.response_tokens))
        speed_up = f"{speed.tokens_per_second / first.tokens_per_second:.2f}"
        table.add_row(*counts, f"{speed.seconds:.2f}", f"{speed.tokens_per_second:.1f}", speed_up)
    return table


def _sample(
    clients: Sequence[SglangClient], requests: Sequence[Request], sampling: Sampling, concurrency: int
) -> tuple[int, float]:
    """Send requests as the trainer does; returns tokens sampled and seconds taken."""
    answers = Answers()
    start = time.perf_counter()
    RequestPool(clients, concurrency, attempts=1).run(requests, sampling, answers)
    seconds = time.perf_counter() - start
    if answers.lost:
        lost = next(iter(answers.lost.values()))
        raise UserError(describe("bench rollout", f"{len(answers.lost)} requests", lost, "See the servers' logs."))
    return sum(len(answer.response) for answer in answers.found.values()), seconds
