"""Floating-point operations of a step: those of the model, and those that the hardware does besides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_copsd.plan.layout import Recompute
from megatron_copsd.plan.sizes import ModelSizes

# A backward pass multiplies twice for each product of the forward pass; fused attention also forms its scores again.
_BACKWARD = 2.0
_ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class StepFlops:
    """Of one step over all GPUs.

    Attributes:
        model: what the mathematics needs: one teacher forward, the student's forward and backward, four products with
            the output weight. MFU counts these.
        hardware: the same and whatever is computed again. HFU counts these.
    """

    model: float
    hardware: float


def linear_flops_per_token(sizes: ModelSizes) -> float:
    """Forward operations of one layer's matrix products for one token."""
    projections = sizes.hidden * (2 * sizes.query_width + 2 * sizes.kv_width)
    return 2.0 * projections + feed_forward_flops_per_token(sizes)


def feed_forward_flops_per_token(sizes: ModelSizes) -> float:
    """Those of the feed-forward: gated, of one width or of the experts that a token goes to, and their router."""
    if not sizes.experts:
        return 2.0 * 3 * sizes.hidden * sizes.ffn
    return 2.0 * sizes.hidden * (sizes.experts_per_token * 3 * sizes.expert_ffn + sizes.experts)


def attention_flops(sizes: ModelSizes, length: int) -> float:
    """Forward operations of one layer's causal attention over one sequence: two products over half of length^2."""
    return 2.0 * sizes.query_width * length * length


def head_flops(sizes: ModelSizes, rows: int) -> float:
    """Operations of one product of so many rows with the output weight."""
    return 2.0 * rows * sizes.hidden * sizes.vocab_size


def step_flops(
    sizes: ModelSizes,
    student: Iterable[int],
    teacher: Iterable[int],
    rows: int,
    recompute: Recompute = "none",
    loss_recompute: bool = False,
    adapters: bool = False,
) -> StepFlops:
    """Count one training step without its rollouts; padding counts as nothing.

    Args:
        sizes: of the model.
        student, teacher: tokens of every sequence of the step; no teacher where there is none.
        rows: response rows of the step.
        recompute: activations that the backward pass computes again.
        loss_recompute: whether the loss forms its logits again in the backward pass.
        adapters: whether the model's weights get no gradient; the adapters' own products count as nothing.
    """
    linear = linear_flops_per_token(sizes) * sizes.layers
    own, given = list(student), list(teacher)
    attention = sizes.layers * sum(attention_flops(sizes, length) for length in own)
    forward = linear * sum(own) + attention
    teacher_forward = linear * sum(given) + sizes.layers * sum(attention_flops(sizes, length) for length in given)
    views = 2 if given else 1
    products = views + (1 if adapters else 2)
    backward = _BACKWARD * forward - (linear * sum(own) if adapters else 0.0)
    model = forward + backward + teacher_forward + products * head_flops(sizes, rows)
    fed = sizes.layers * sum(own) * feed_forward_flops_per_token(sizes)
    again = {"none": 0.0, "selective": fed, "full": forward}[recompute]
    again += (_ATTENTION_BACKWARD - _BACKWARD) * attention
    again += views * head_flops(sizes, rows) if loss_recompute else 0.0
    return StepFlops(model, model + again)
