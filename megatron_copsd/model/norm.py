"""RMSNorm of the torch implementation, which also works on a part of the sequence."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """y = x / sqrt(mean(x^2) + eps) * w over the last dimension, with statistics in float32 (arXiv 1910.07467).

    Under sequence parallelism each tensor-parallel rank normalises its own positions, so its gradient of w is a part of
    the sum; the attribute ``sequence_parallel`` has Megatron add the parts up. Megatron's own wrapper of torch's norm
    refuses sequence parallelism because it lacks the attribute.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel
