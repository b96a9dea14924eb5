"""sglang.verify: weights that reach a real server otherwise than they were sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from processes import PATIENCE
from sglang_servers import weights
from transformers import AutoModelForCausalLM

from megatron_copsd.errors import UserError
from megatron_copsd.hf.read import read_architecture
from megatron_copsd.rollout.engine import Bucket, Probe
from megatron_copsd.rollout.sglang.client import SglangClient
from megatron_copsd.rollout.sglang.engine import Transport
from megatron_copsd.sync.checksums import WeightChecksums
from megatron_copsd.sync.log_probs import ProbeLogProbs
from megatron_copsd.sync.tensor import TensorTransport

pytestmark = pytest.mark.sglang

CHANGED = "model.layers.1.self_attn.k_proj.weight"


@dataclass
class Distorting:
    """A transport that changes one number on the way, in the first ``times`` pushes."""

    transport: Transport
    times: int
    factor: float
    pushes: int = 0

    def push(
        self, buckets: Iterator[Bucket], weight_version: int, clients: Sequence[SglangClient], *, flush_cache: bool
    ) -> None:
        self.pushes += 1
        given = map(self._distorted, buckets) if self.pushes <= self.times else buckets
        self.transport.push(given, weight_version, clients, flush_cache=flush_cache)

    def close(self) -> None:
        self.transport.close()

    def _distorted(self, bucket: Bucket) -> Bucket:
        tensors = [tensor.clone() for tensor in bucket.tensors]
        if CHANGED in bucket.names:
            tensors[bucket.names.index(CHANGED)][3, 5] *= self.factor
        return Bucket(bucket.names, tuple(tensors))


def probes_of(model) -> list[Probe]:
    """What transformers says of two sequences."""
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = []
    for tokens in (tuple(range(5, 45)), tuple(range(90, 60, -1))):
        with torch.no_grad():
            log_probs = hf(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        found.append((tokens, tuple(log_probs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist())))
    return found


def test_weights_that_arrive_otherwise(attach_engine, model):
    """Both verifiers on one server: by checksum one bit counts, by log-probabilities what can be seen in them."""
    architecture = read_architecture(str(model), None)
    checksums = WeightChecksums(1, architecture.kv_groups, torch.float32, on_gpu=False)
    clean = TensorTransport(1, PATIENCE)
    engine = attach_engine(clean, verifier=checksums)
    last_bit = 1 + torch.finfo(torch.float32).eps

    engine.transport = Distorting(clean, times=1, factor=last_bit)
    engine.update_weights(weights(model), 1)
    assert engine.transport.pushes == 2, "sent again, once"
    assert checksums.difference(engine.clients[0]) is None

    engine.transport = Distorting(clean, times=9, factor=last_bit)
    with pytest.raises(UserError, match=r"weight sync: 2: .*layers\.1\.self_attn\.qkv_proj\.weight .*1 parameters"):
        engine.update_weights(weights(model), 2)
    assert engine.transport.pushes == 2, "as often as EngineOptions.attempts says"

    engine.verifier = ProbeLogProbs(limit=1e-5)
    probes = probes_of(model)
    engine.transport = Distorting(clean, times=1, factor=50.0)
    engine.update_weights(weights(model), 3, lambda: probes)
    assert engine.transport.pushes == 2
    engine.transport = Distorting(clean, times=9, factor=50.0)
    with pytest.raises(
        UserError, match=r"weight sync: 4: .*differ by .* nats a token, above sglang\.verify_limit = 1e-05"
    ):
        engine.update_weights(weights(model), 4, lambda: probes)
