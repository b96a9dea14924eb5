"""Dense oracle of every loss kernel: short, differentiable by autograd, exact in float64.

Tests and benchmarks compare against these functions; they allocate [R, V] freely and are never used for training.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from copsd_kernels.arguments import FLOATING, Arguments

DivergenceKind = Literal["forward_kl", "reverse_kl", "jsd"]


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: DivergenceKind,
    *,
    jsd_weight: float = 0.5,
    temperature: float = 1.0,
    entry_clip: float | None = None,
    token_clip: float | None = None,
) -> Tensor:
    """Divergence of each row between teacher p and student q, the softmaxes of logits / temperature.

    forward_kl = sum_v p log(p / q); reverse_kl = sum_v q log(q / p);
    jsd = sum_v w p log(p / m) + (1 - w) q log(q / m) with m = w p + (1 - w) q (generalised Jensen-Shannon divergence
    of GKD, arXiv 2306.13649, with w on the teacher). There is no temperature**2 factor. ``entry_clip`` replaces each
    entry of the sum by min(entry, entry_clip) (pointwise clipping of OPSD, arXiv 2601.18734); ``token_clip`` replaces
    the sum by min(sum, token_clip). As in torch.clamp, the gradient passes at equality.

    Args:
        student_logits: [R, V], float32 or float64.
        teacher_logits: [R, V], same dtype; taken as a constant.
        kind: which divergence.
        jsd_weight: w, in (0, 1); used by jsd alone.
        temperature: divides both logits.
        entry_clip: cap of each vocabulary entry in nats, or None.
        token_clip: cap of each row in nats, or None.

    Returns:
        [R] in nats, differentiable in ``student_logits``.

    Raises:
        UserError: an argument breaks its rule.
    """
    check = Arguments("divergence")
    check.tensor("student_logits", student_logits, "R V", FLOATING)
    check.tensor("teacher_logits", teacher_logits, "R V", (student_logits.dtype,))
    check.choice("kind", kind, get_args(DivergenceKind))
    check.number("jsd_weight", jsd_weight, below=1)
    check.number("temperature", temperature)
    for name, clip in (("entry_clip", entry_clip), ("token_clip", token_clip)):
        if clip is not None:
            check.number(name, clip)
    x, y = _log_softmax(student_logits, temperature), _log_softmax(teacher_logits.detach(), temperature)
    if kind == "forward_kl":
        entries = y.exp() * (y - x)
    elif kind == "reverse_kl":
        entries = x.exp() * (x - y)
    else:
        log_m = torch.logaddexp(y + math.log(jsd_weight), x + math.log1p(-jsd_weight))
        entries = jsd_weight * y.exp() * (y - log_m) + (1 - jsd_weight) * x.exp() * (x - log_m)
    if entry_clip is not None:
        entries = entries.clamp(max=entry_clip)
    rows = entries.sum(dim=-1)
    return rows if token_clip is None else rows.clamp(max=token_clip)


def token_log_prob(logits: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of each row's label: log softmax(logits / temperature)[label].

    Args:
        logits: [R, V], float32 or float64.
        labels: [R], int64 in [0, V).
        temperature: divides the logits.

    Returns:
        [R] in nats, differentiable in ``logits``.

    Raises:
        UserError: an argument breaks its rule.
    """
    check = Arguments("token_log_prob")
    check.tensor("logits", logits, "R V", FLOATING)
    check.tensor("labels", labels, "R", (torch.int64,))
    check.number("temperature", temperature)
    return _log_softmax(logits, temperature).gather(1, labels[:, None])[:, 0]


def entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy of each row: -sum_v p log p with p = softmax(logits / temperature).

    Args:
        logits: [R, V], float32 or float64.
        temperature: divides the logits.

    Returns:
        [R] in nats.

    Raises:
        UserError: an argument breaks its rule.
    """
    check = Arguments("entropy")
    check.tensor("logits", logits, "R V", FLOATING)
    check.number("temperature", temperature)
    x = _log_softmax(logits, temperature)
    return -(x.exp() * x).sum(dim=-1)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    # Skipping a division by 1 keeps the oracle honest as the dense baseline of the benchmarks.
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
