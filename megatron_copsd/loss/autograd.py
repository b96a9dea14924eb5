"""A fused loss as autograd sees it: what a row pass reads, what it fills, and when it runs.

The loss is a weighted sum over rows, L = sum_r w_r l_r. One *row pass* over ``Views`` yields all l_r and, for given w,
``Gradients`` with respect to hidden states and weight: in the forward pass, while the logits are there, or recomputed
in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from copsd_kernels.gemm import add_hidden_gradient, add_weight_gradient, compute_dtype, write_hidden_gradient
from megatron_copsd.loss.shards import sum_over_shards_
from megatron_copsd.types import VocabShard


@dataclass(frozen=True)
class GradientOptions:
    """Where the gradients of a fused loss go, and when they are made; none of it changes their values.

    Attributes:
        recompute: make them in the backward pass, from logits that are computed a second time (6 products with the
            output weight instead of 4). Nothing but the inputs is held in between, and the row values themselves are
            differentiable.
        weight_gradient: [V_local, H] of ``compute_dtype``; the weight's gradient is added to it at once, and autograd
            sees none. For Megatron's ``main_grad``. The loss must then be differentiated with an upstream gradient of
            1, once, unless it is recomputed.
        partial_hidden_gradient: leave the hidden states' gradient as this shard's part, for a caller whose own
            backward pass sums over the shards, as the reduce-scatter of Megatron's sequence parallelism does.
    """

    recompute: bool = False
    weight_gradient: Tensor | None = None
    partial_hidden_gradient: bool = False


DEFAULT_GRADIENT_OPTIONS = GradientOptions()


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


class RowPass(Protocol):
    """One walk over all rows."""

    def __call__(self, row_weights: Tensor, gradients: Gradients) -> tuple[Tensor, ...]:
        """Return row values l [R], float64, then diagnostics; fill the wanted gradients of sum_r w_r l_r."""
        ...


@dataclass(frozen=True)
class Gradients:
    """Accumulators of the gradients with respect to hidden states and weight; None where not wanted.

    Attributes:
        hidden: [R, H] of ``compute_dtype``.
        weight: [V_local, H] of ``compute_dtype``.
    """

    hidden: Tensor | None
    weight: Tensor | None

    @classmethod
    def zeros(cls, hidden: Tensor, weight: Tensor, wanted: tuple[bool, bool], options: GradientOptions) -> Gradients:
        """Accumulators at zero, but for a weight gradient that the caller has given."""
        dtype = compute_dtype(weight)
        given = options.weight_gradient
        assert given is None or (given.shape == weight.shape and given.dtype == dtype), "weight_gradient does not fit"
        return cls(
            torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if wanted[0] else None,
            (torch.zeros(weight.shape, dtype=dtype, device=weight.device) if given is None else given)
            if wanted[1]
            else None,
        )

    @property
    def wanted(self) -> bool:
        """Whether any gradient is asked for."""
        return self.hidden is not None or self.weight is not None

    def add(self, rows: slice, hidden: Tensor, weight: Tensor, dlogits: Tensor, scratch: Tensor | None) -> None:
        """Add some rows' part, given the gradient of their logits.

        Args:
            rows: which of the R rows.
            hidden: [G, H] their hidden states, in the dtype that enters the products.
            weight: [V_valid, H] without padding of the vocabulary.
            dlogits: [G, V_valid], dtype of ``hidden``.
            scratch: for the products.
        """
        if self.hidden is not None:
            write_hidden_gradient(dlogits, weight, self.hidden[rows], scratch)
        if self.weight is not None:
            add_weight_gradient(dlogits, hidden, self.weight[: weight.shape[0]], scratch)

    def add_columns(
        self, columns: slice, hidden: Tensor, weight: Tensor, dlogits: Tensor, scratch: Tensor | None
    ) -> None:
        """Add all rows' part that some columns of the shard have.

        Args:
            columns: which of the V_local.
            hidden: [R, H], in the dtype that enters the products.
            weight: [columns, H], their rows of the weight.
            dlogits: [R, columns], dtype of ``hidden``.
            scratch: for the products.
        """
        if self.hidden is not None:
            add_hidden_gradient(dlogits, weight, self.hidden, scratch)
        if self.weight is not None:
            add_weight_gradient(dlogits, hidden, self.weight[columns], scratch)

    def finish(
        self, dtype: torch.dtype, options: GradientOptions, group: dist.ProcessGroup | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """What autograd is to see of each, rounded to ``dtype``.

        Collectives: one all_reduce [R, H] over ``group`` before rounding, if the hidden states' gradient is wanted.
        """
        if self.hidden is not None and not options.partial_hidden_gradient:
            sum_over_shards_(self.hidden, group)
        weight = None if options.weight_gradient is not None else self.weight
        return None if self.hidden is None else self.hidden.to(dtype), None if weight is None else weight.to(dtype)


def weighted_loss(
    run: RowPass,
    hidden: Tensor,
    weight: Tensor,
    row_weights: Tensor,
    options: GradientOptions,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a row pass and make L = sum_r w_r l_r differentiable in hidden states and weight.

    Args:
        run: the pass.
        hidden: [R, H].
        weight: [V_local, H].
        row_weights: w, [R], a constant.
        options: of the gradients.
        group: ranks that hold the shards of the vocabulary.

    Returns:
        L, scalar of ``compute_dtype``; and what the pass returned, detached but for recomputed row values.
    """
    row_weights = row_weights.double()
    if options.recompute:
        outputs = _recomputed(hidden, weight, run, row_weights, options, group)
        return (row_weights * outputs[0]).sum().to(compute_dtype(weight)), outputs
    on = torch.is_grad_enabled()
    wanted = on and hidden.requires_grad, on and weight.requires_grad
    with torch.no_grad():
        gradients = Gradients.zeros(hidden, weight, wanted, options)
        outputs = run(row_weights, gradients)
        loss = (row_weights * outputs[0]).sum().to(compute_dtype(weight))
        if not gradients.wanted:
            return loss, outputs
        finished = gradients.finish(hidden.dtype, options, group)
    return _precomputed(hidden, weight, loss, *finished, options.weight_gradient is not None), outputs


class _Precomputed(torch.autograd.Function):
    """A scalar whose gradients are known; the backward pass multiplies them, in place, by the upstream gradient.

    In place because the weight's gradient is as large as the weight. A second backward pass through the same graph is
    therefore refused by autograd ("modified by an inplace operation").
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        loss: Tensor,
        hidden_gradient: Tensor | None,
        weight_gradient: Tensor | None,
        upstream_is_one: bool,
    ) -> Tensor:
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.upstream_is_one = upstream_is_one
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.upstream_is_one:
            # Asynchronous on CUDA: reading the number would stall the stream.
            torch._assert_async(upstream == 1, "the weight's gradient was added already: upstream must be 1")
        scaled = (None if g is None else g.mul_(upstream) for g in ctx.saved_tensors)
        return (*scaled, None, None, None, None)


class _Recomputed(torch.autograd.Function):
    """Row values whose backward pass runs the row pass again, with the upstream gradients as row weights."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        run: RowPass,
        row_weights: Tensor,
        options: GradientOptions,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(hidden, weight)
        ctx.run, ctx.options, ctx.group = run, options, group
        outputs = run(row_weights, Gradients(None, None))
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        gradients = Gradients.zeros(hidden, weight, ctx.needs_input_grad[:2], ctx.options)
        ctx.run(upstream, gradients)
        return (*gradients.finish(hidden.dtype, ctx.options, ctx.group), None, None, None, None)


# torch gives ``apply`` no types.
_precomputed: Callable[..., Tensor] = _Precomputed.apply
_recomputed: Callable[..., tuple[Tensor, ...]] = _Recomputed.apply
