"""What a fused loss is computed from: hidden states, output weights, and where this rank's shard of them lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron_copsd.types import VocabShard


@dataclass(frozen=True)
class Views:
    """One view (a likelihood) or two (student, then teacher) of the same rows, and their output layer.

    Attributes:
        hidden: one [R, H] for each view, detached; any strides.
        weights: one [V_local, H] for each view, padding included; the same object where views share it.
        shard: which entries of the vocabulary the rows of the weights are.
        group: ranks that hold the shards, in vocabulary order; None where this rank holds the whole vocabulary.
        scratch_bytes: budget of all buffers that hold logits, their gradient or parts of the weight; None for the
            device's default.
    """

    hidden: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    shard: VocabShard
    group: dist.ProcessGroup | None
    scratch_bytes: int | None

    def __post_init__(self) -> None:
        for hidden, weight in zip(self.hidden, self.weights, strict=True):
            assert hidden.shape == (len(self.hidden[0]), weight.shape[1]), f"{hidden.shape}: expected [R, H]"
            assert hidden.dtype == weight.dtype, f"{hidden.dtype} hidden states for a {weight.dtype} weight"
            assert weight.shape[0] == self.shard.rows, f"{weight.shape}: the shard says {self.shard.rows} rows"

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.hidden[0])

    @property
    def shared_weight(self) -> bool:
        """Whether all views have the same output weight."""
        return all(weight is self.weights[0] for weight in self.weights)

    def valid_weights(self) -> tuple[Tensor, ...]:
        """The weights without padding of the vocabulary, [V_valid, H], detached; one object where they are shared."""
        first = self.weights[0].detach()[: self.shard.valid].contiguous()
        rest = [
            first if self.shared_weight else weight.detach()[: self.shard.valid].contiguous()
            for weight in self.weights[1:]
        ]
        return first, *rest
