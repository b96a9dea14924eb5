"""sglang.pause: new weights reach the responses that a real server is sampling."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import PATIENCE, metrics, train
from sglang_servers import wait_until_sampling, weights
from tiny import make_model
from transformers import AutoModelForCausalLM

from megatron_copsd.rollout.engine import Bucket, Request, Sampling
from megatron_copsd.sync.tensor import TensorTransport
from megatron_copsd.types import Rollout

pytestmark = pytest.mark.sglang

# Long enough to be under way when the weights come.
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=400, stop_ids=(1,))
REQUESTS = [Request((5 + index, 7, 9), index) for index in range(8)]
OLD, NEW = 7, 8


def difference(folder: Path, request: Request, rollout: Rollout, start: int, end: int) -> float:
    """Largest difference of the engine's log-probabilities of tokens [start, end) from those of a folder's weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.tensor([request.prompt + rollout.response])
    with torch.no_grad():
        log_probs = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    ours = log_probs[len(request.prompt) - 1 :][start:end]
    return float((ours - torch.tensor(rollout.token_log_probs[start:end])).abs().max())


@pytest.mark.parametrize("pause", ["retract", pytest.param("in_place", marks=pytest.mark.slow)])
def test_new_weights_reach_what_is_being_sampled(attach_engine, model, tmp_path, pause):
    other = make_model(tmp_path / "other", initializer_range=0.21)
    engine = attach_engine(TensorTransport(1, PATIENCE), pause=pause)
    engine.update_weights(weights(model), OLD)
    engine.begin(REQUESTS, SAMPLING)
    while not wait_until_sampling(engine.clients[0].url):  # all were sampled between two looks: once more
        engine.finish(OLD)
        engine.begin(REQUESTS, SAMPLING)
    engine.update_weights(weights(other), NEW)
    rollouts = engine.finish(NEW)
    interrupted = [(q, r) for q, r in zip(REQUESTS, rollouts, strict=True) if len(r.versions) > 1]
    assert interrupted, "none was being sampled: sample longer"
    for _, rollout in interrupted:
        old, new = rollout.versions
        assert (old.version, new.version, rollout.weight_version) == (OLD, NEW, NEW)
        assert (old.start, old.end, new.end) == (0, new.start, len(rollout.response))
    request, rollout = interrupted[0]
    old, new = rollout.versions
    assert difference(model, request, rollout, old.start, old.end) < 1e-4
    if pause == "retract":
        assert difference(other, request, rollout, new.start, new.end) < 1e-4
    # Nothing that is cached of the old weights is used for what begins now.
    engine.begin(REQUESTS[:1], SAMPLING)
    (fresh,) = engine.finish(NEW)
    assert difference(other, REQUESTS[0], fresh, 0, len(fresh.response)) < 1e-4


@pytest.mark.slow
def test_a_server_killed_while_it_is_paused(start_engine, model):
    engine = start_engine("tensor", pause="retract")
    engine.update_weights(weights(model), OLD)
    source, killed = weights(model), []

    def killing() -> Iterator[Bucket]:
        for number, bucket in enumerate(source()):
            if number == 1 and not killed:
                killed.append(engine.fleet.own[0].pid)
                os.kill(killed[0], signal.SIGKILL)
            yield bucket

    engine.begin(REQUESTS, SAMPLING)
    wait_until_sampling(engine.clients[0].url)
    engine.update_weights(killing, NEW)
    rollouts = engine.finish(NEW)
    assert len(rollouts) == len(REQUESTS)
    assert {span.version for rollout in rollouts for span in rollout.versions} <= {OLD, NEW}
    assert engine.fleet.restarts == 1


@pytest.mark.slow
def test_training_with_interruptions(config, tmp_path):
    longer = ("rollout.ahead=1", "rollout.max_response_tokens=300", "run.steps=4")
    train(config, f"run.dir={tmp_path}", "sglang.pause=retract", "sglang.verify=checksum", *longer)
    staleness = [line["staleness"] for line in metrics(tmp_path)]
    assert staleness[0] == 0
    assert all(0 < value <= 1 for value in staleness[1:]), staleness
    assert min(staleness[1:]) < 1, "no response was interrupted"
