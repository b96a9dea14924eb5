"""Hostile requests against a real server: each is refused in words or answered, and the server goes on as before."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pytest
from small_tokenizer import small_tokenizer
from tiny import make_model, settings, write_config

from megatron_copsd.config.load import load_config
from megatron_copsd.errors import UserError
from megatron_copsd.rollout.engine import Request, Sampling
from megatron_copsd.rollout.sglang.client import Answer, Limits, SglangClient
from megatron_copsd.rollout.sglang.process import SglangServer, plan_servers, start_all

pytestmark = pytest.mark.sglang

POSITIONS = 64
VOCAB = len(small_tokenizer())
REQUESTS = 200
NAN, INF = math.nan, math.inf

# Values for each part of a request: some fit, at the very edge, most do not.
PROMPTS: tuple[Any, ...] = (
    (), [], None, "", "text", (-1,), (VOCAB,), (VOCAB - 1, 0), (2**31,), (2**70,), (-(2**70),), (1.0,), (NAN,), (True,),
    ("5",), (None,), ((5,),), (5, -5, 5), (5,), (5,) * (POSITIONS - 3), (5,) * (POSITIONS - 2), (5,) * POSITIONS,
    (5,) * 100_000, [5, 6, 7],
)  # fmt: skip
FIELDS: dict[str, tuple[Any, ...]] = {
    "temperature": (0, 1e-320, 1e-7, 1e30, 1e300, 10**400, -0.0, -1.0, NAN, INF, -INF, True, "1", None),
    "top_p": (1, 1e-320, 1e-9, 0, -0.5, 1.0000001, 2, NAN, INF, True, "0.5", None),
    "top_k": (1, VOCAB - 1, VOCAB, 2**31, 2**70, -1, -(2**70), 2.0, NAN, True, "3", None),
    "max_tokens": (1, 3, POSITIONS, POSITIONS - 4, POSITIONS - 5, 0, -1, 2**31, 2**70, 1.5, NAN, INF, True, "4", None),
    "stop_ids": ((), (0,), (7, 7, 7), tuple(range(VOCAB)), (VOCAB,), (-1,), (2**70,), (1.0,), ("a",), (None,), (True,)),
    "seed": (-1, 2**31, 2**63, 2**70, -(2**70), 1.5, NAN, True, "0", None),
}
ORDINARY: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 3, "stop_ids": (), "seed": 1}
PROMPT = (5, 6, 7)
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=24, stop_ids=())
PROBE = Request((4, 8, 15, 16, 23, 42), seed=0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangServer]:
    folder = tmp_path_factory.mktemp("fuzz")
    model = make_model(folder / "model", max_position_embeddings=POSITIONS)
    tree = settings(folder, model, rollout={"engine": "sglang"}, sglang={"max_total_tokens": 2048})
    config = load_config(write_config(folder, tree)).config
    server = SglangServer(plan_servers(config)[0])
    start_all([server], config.sglang.start_timeout_s)
    yield server
    server.stop()


def cases() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Every value above in an otherwise ordinary request, then requests with several of them."""
    for prompt in PROMPTS:
        yield prompt, dict(ORDINARY)
    for part, values in FIELDS.items():
        yield from ((PROMPT, {**ORDINARY, part: value}) for value in values)
    draw = random.Random(20)
    while True:
        chosen = draw.sample(list(FIELDS), draw.choice((1, 2, 3)))
        prompt = draw.choice((PROMPT, PROMPT, draw.choice(PROMPTS)))
        yield prompt, {**ORDINARY, **{part: draw.choice(FIELDS[part]) for part in chosen}}


def outcome(client: SglangClient, prompt: Any, values: dict[str, Any]) -> str:
    """Send one request as a response to sample (or, now and then, as text to score) and check what comes of it."""
    seed = values.pop("seed")
    try:
        if seed == -1:
            scores = client.score(prompt)
            assert len(scores) == len(prompt) - 1
            assert all(math.isfinite(score) and score <= 0 for score in scores)
            return "scored"
        check_answer(client.generate(Request(prompt, seed), Sampling(**values)), values)
        return "answered"
    except UserError as error:
        return "refused by the server" if "HTTP 400" in str(error) else "refused"


def check_answer(answer: Answer, values: dict[str, Any]) -> None:
    assert 1 <= len(answer.response) <= values["max_tokens"]
    assert all(0 <= token < VOCAB for token in answer.response)
    assert len(answer.token_log_probs) == len(answer.response)
    assert all(math.isfinite(value) and value <= 0 for value in answer.token_log_probs), (values, answer)
    assert answer.finish_reason == "stop" or (answer.finish_reason, len(answer.response)) == (
        "length",
        values["max_tokens"],
    )
    assert [(span.start, span.end) for span in answer.versions] == [(0, len(answer.response))]


def test_hostile_requests_are_refused_or_answered(server: SglangServer) -> None:
    client = SglangClient(server.url, Limits(VOCAB, POSITIONS), request_seconds=60.0, connections=8)
    before = client.generate(PROBE, GREEDY)
    assert len(before.response) == GREEDY.max_tokens
    with ThreadPoolExecutor(max_workers=8) as pool:  # so that what is refused is beside what is answered
        outcomes = Counter(pool.map(lambda case: outcome(client, *case), islice(cases(), REQUESTS)))
    print(dict(outcomes))
    assert outcomes["answered"] >= REQUESTS // 5
    assert outcomes["refused"] >= REQUESTS // 3
    assert outcomes["scored"] >= 1
    assert server.is_alive
    assert client.is_ready()
    assert client.generate(PROBE, GREEDY).response == before.response
    client.close()
