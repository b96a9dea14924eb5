"""Whether a server holds the weights that it was sent, by its and the trainer's log-probabilities of a few prompts.

Unlike checksums this takes servers that keep weights in a form of their own, and costs the trainer a forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel

from megatron_copsd.config.schema import Config
from megatron_copsd.methods.likelihood import trainer_log_probs
from megatron_copsd.model.build import LocalModel
from megatron_copsd.model.passes import make_microbatches
from megatron_copsd.rollout.engine import Bucket, Probe
from megatron_copsd.rollout.sglang.client import SglangClient
from megatron_copsd.types import PromptPair, Rollout, Sample

_PROBES, _PROBE_TOKENS = 4, 256


@dataclass
class ProbeLogProbs:
    """What every server should say of the probes; ``limit`` is for the mean difference of their tokens, in nats.

    The mean, because prompts hold tokens so unlikely that rounding alone moves their log-probability by much.
    """

    limit: float
    _expected: Sequence[Probe] = ()

    def watch(self, buckets: Iterator[Bucket], probes: Sequence[Probe]) -> Iterator[Bucket]:
        """See ``Verifier.watch``."""
        self._expected = probes
        return buckets

    def difference(self, client: SglangClient) -> str | None:
        """See ``Verifier.difference``."""
        differences = [
            abs(ours - (math.nan if theirs is None else theirs))  # null is what JSON says of NaN
            for tokens, log_probs in self._expected
            for ours, theirs in zip(log_probs, client.score(tokens), strict=True)
        ]
        mean = math.fsum(differences) / len(differences)
        if mean <= self.limit:
            return None
        limit = f"sglang.verify_limit = {self.limit:g}"
        return f"{client.url} and the trainer differ by {mean:.4g} nats a token, above {limit}"


@dataclass(frozen=True)
class TrainerProbes:
    """Makes the probes: the first prompts of the training data, as if all their tokens but the first were a response.

    Attributes:
        config: settings.
        model: whose log-probabilities are right; ``ddp`` are its chunks behind Megatron's buffers.
        pairs: prompts to take them from.
        pad_id: any valid token id.
    """

    config: Config
    model: LocalModel
    ddp: Sequence[DistributedDataParallel]
    pairs: Sequence[PromptPair]
    pad_id: int

    def __call__(self) -> list[Probe]:
        """Return the probes with what the model's current weights say of them.

        Collectives: those of ``trainer_log_probs``.
        """
        samples = [_probe_sample(pair, index) for index, pair in enumerate(self.pairs[:_PROBES])]
        batches = make_microbatches(samples, "student", self.config, self.model.layout, self.pad_id)
        found = trainer_log_probs(self.model, self.ddp, batches, self.config, temperature=1.0)
        return [
            (sample.pair.student_prompt + sample.rollout.response, tuple(found[sample.index])) for sample in samples
        ]


def _probe_sample(pair: PromptPair, index: int) -> Sample:
    tokens = pair.student_prompt[:_PROBE_TOKENS]
    rest = Rollout(tokens[1:], (0.0,) * (len(tokens) - 1), "length", weight_version=0, text="")
    return Sample(PromptPair(pair.problem, tokens[:1], tokens[:1]), rest, index)
