"""Whether a server holds the weights that it was sent, by its log-probabilities of a few prompts.

Unlike checksums this takes servers that keep weights in a form of their own, and costs the trainer a forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_copsd.rollout.engine import Bucket, Probe
from megatron_copsd.rollout.sglang.client import SglangClient


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
