"""Sending the trainer's weights to the engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_copsd.model.build import LocalModel
from megatron_copsd.model.gather import iter_hf_tensors
from megatron_copsd.rollout.engine import Bucket, ProbeSource, RolloutEngine
from megatron_copsd.sync.buckets import in_buckets


@dataclass(frozen=True)
class WeightPush:
    """Gives the engine the model's current weights.

    Attributes:
        engine: what they are for.
        model: whose they are.
        bucket_bytes: handed over at once.
        probes: what the engine's log-probabilities are compared with after a sync; None for nothing.
    """

    engine: RolloutEngine
    model: LocalModel
    bucket_bytes: int
    probes: ProbeSource | None = None

    def __call__(self, weight_version: int) -> None:
        """Send the weights under this version, unless the engine has them.

        Collectives: gathers every parameter over tensor and pipeline ranks.
        """
        if self.engine.weight_version != weight_version:
            self.engine.update_weights(self._buckets, weight_version, self.probes)

    def _buckets(self) -> Iterator[Bucket]:
        model = self.model
        tensors = iter_hf_tensors(model.chunks, model.architecture, *model.layout.weight_groups)
        return in_buckets(tensors, self.bucket_bytes)
