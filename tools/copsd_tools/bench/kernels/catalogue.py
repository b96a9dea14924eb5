"""Names of what is computed and of the ways of computing it, for tables and help; nothing heavy is imported for them.

``subjects/`` has the code behind each name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

What = Literal["divergence", "cross_entropy", "log_probs"]

FLOOR = "gemm_floor"  # stands among the implementations in results: the matrix products alone
_COMPILED = {"dense_compiled": "torch.compile of dense"}
_CHECKPOINTED = {"checkpointed": "dense in chunks of rows, each under torch.utils.checkpoint"}


@dataclass(frozen=True)
class Offer:
    """Something to compute, and descriptions of the ways of computing it, by name, in the order of all tables."""

    description: str
    implementations: Mapping[str, str]


def _fused(function: str, *, recompute: bool = True) -> dict[str, str]:
    """The project's own rows: one for each value of ``loss.implementation``, and one that recomputes."""
    rows = {"fused": f"this project's {function}"}
    rows |= {f"fused_{name}": f"the same, implementation {name}" for name in ("torch", "chunk", "streaming")}
    return rows | ({"fused_recompute": "the same, gradients made in the backward pass"} if recompute else {})


CATALOGUE: Mapping[What, Offer] = {
    "divergence": Offer(
        "divergence between teacher and student, forward and backward",
        {
            **_fused("fused_linear_divergence"),
            "dense": "eager autograd over all logits (the oracle's code)",
            **_COMPILED,
            "liger_fused": "Liger's fused_linear_jsd (Triton)",
            "liger_chunked": "Liger's LigerFusedLinearJSDLoss, compiled, at its default chunk",
            "liger_chunked_best": "the same at the fastest of three chunks",
            "liger_chunked_eager": "the same at its default chunk, not compiled",
            **_CHECKPOINTED,
        },
    ),
    "cross_entropy": Offer(
        "cross-entropy of labels (sft, grpo), forward and backward",
        {
            **_fused("fused_linear_cross_entropy"),
            "dense": "eager autograd: logits, torch's cross_entropy",
            **_COMPILED,
            "torch_chunked": "torch's linear_cross_entropy in chunks",
            "liger_fused": "Liger's fused_linear_cross_entropy (Triton)",
            "cce": "Apple's cut_cross_entropy (Triton)",
            "cce_compiled": "the same package's impl torch_compile",
            **_CHECKPOINTED,
        },
    ),
    "log_probs": Offer(
        "log-probability of labels and entropy (grpo, engine agreement), forward alone",
        {
            **_fused("fused_linear_cross_entropy without gradients", recompute=False),
            "dense": "all logits: log_softmax, gather, sum",
            **_COMPILED,
            "dense_chunked": "dense in chunks of rows",
        },
    ),
}
