"""Products with the output weight whose results are float32 (float64 for float64 weights), whatever the weight's dtype.

Rounding logits to bfloat16 ruins the gradient of a divergence between near-equal models (its relative error grows as
the divergence shrinks), so logits are never rounded. Where the hardware multiplies bfloat16 and returns the float32
accumulator, that is used; elsewhere the weight is upcast into scratch, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from copsd_kernels.scratch import ScratchShape


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of logits and of accumulated gradients: float64 for a float64 weight, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def operand_dtype(weight: Tensor) -> torch.dtype:
    """Dtype that hidden states must have when they enter the products below."""
    return weight.dtype if _multiplies_natively(weight) else compute_dtype(weight)


def scratch_shape(weight: Tensor, rows: int, views: int, work_buffers: int, differentiate: bool) -> ScratchShape:
    """Return what decides the buffers of a walk over ``rows`` rows with this weight, padding of the vocabulary counted.

    Args:
        weight: [V_local, H]; only its shape, dtype and device matter.
        rows: R.
        views: 1 or 2.
        work_buffers: blocks of scratch that the row kernels need; 0 for a walk over columns.
        differentiate: whether gradients are wanted.
    """
    width, hidden = weight.shape
    return ScratchShape(
        views=views,
        rows=rows,
        width=width,
        columns=width,
        hidden=hidden,
        item=compute_dtype(weight).itemsize,
        operand_item=operand_dtype(weight).itemsize,
        weight_item=weight.dtype.itemsize,
        work_buffers=work_buffers,
        differentiate=differentiate,
        device=weight.device.type,
    )


def product_scratch(weight: Tensor, rows: int) -> Tensor | None:
    """Scratch of the products below, [rows, H] of ``compute_dtype``; None for 0 rows."""
    if rows == 0:
        return None
    return torch.empty(rows, weight.shape[1], dtype=compute_dtype(weight), device=weight.device)


def project(hidden: Sequence[Tensor], weight: Tensor, logits: Sequence[Tensor], scratch: Tensor | None) -> None:
    """Write logits = hidden weight^T for each hidden; all go through the same calls, so equal inputs give equal bits.

    Args:
        hidden: each [C, H] of ``operand_dtype``, contiguous.
        weight: [V_local, H].
        logits: one [C, V_local] of ``compute_dtype`` for each hidden, overwritten.
        scratch: [rows, H] of ``compute_dtype``; None where the weight already has that dtype.
    """
    if _multiplies_natively(weight):
        for x, out in zip(hidden, logits, strict=True):
            _mm(x, weight.t(), out)
        return
    for columns, upcast in _upcast(weight, scratch):
        for x, out in zip(hidden, logits, strict=True):
            torch.mm(x, upcast.t(), out=out[:, columns])


def write_hidden_gradient(dlogits: Tensor, weight: Tensor, gradient: Tensor, scratch: Tensor | None) -> None:
    """Write gradient = dlogits weight, this shard's part of the hidden states' gradient.

    Args:
        dlogits: [C, V_local] of ``operand_dtype``.
        weight: [V_local, H].
        gradient: [C, H] of ``compute_dtype``, overwritten.
        scratch: as for ``project``.
    """
    if _multiplies_natively(weight):
        _mm(dlogits, weight, gradient)
    else:
        add_hidden_gradient(dlogits, weight, gradient.zero_(), scratch)


def add_hidden_gradient(dlogits: Tensor, weight: Tensor, gradient: Tensor, scratch: Tensor | None) -> None:
    """Add dlogits weight to the hidden states' gradient, for some columns of the shard.

    Args:
        dlogits: [C, columns] of ``operand_dtype``.
        weight: [columns, H], the rows of the weight that belong to them.
        gradient: [C, H] of ``compute_dtype``, accumulated into.
        scratch: [rows, H] of ``compute_dtype``; None where the weight already has that dtype.
    """
    if weight.dtype == gradient.dtype:
        gradient.addmm_(dlogits, weight)
    elif dlogits.dtype == gradient.dtype:
        for columns, upcast in _upcast(weight, scratch):
            gradient.addmm_(dlogits[:, columns], upcast)
    else:
        assert scratch is not None, f"products of {dlogits.dtype} operands are added through scratch"
        for rows in _slices(gradient.shape[0], scratch.shape[0]):
            part = scratch[: rows.stop - rows.start]
            _mm(dlogits[rows], weight, part)
            gradient[rows].add_(part)


def add_weight_gradient(dlogits: Tensor, hidden: Tensor, gradient: Tensor, scratch: Tensor | None) -> None:
    """Add dlogits^T hidden to the weight's gradient.

    Args:
        dlogits: [C, V_local] of ``operand_dtype``.
        hidden: [C, H] of ``operand_dtype``.
        gradient: [V_local, H] of ``compute_dtype``, accumulated into.
        scratch: [rows, H] of ``compute_dtype``; needed where the operands have another dtype.
    """
    if dlogits.dtype == gradient.dtype:
        gradient.addmm_(dlogits.t(), hidden)
        return
    assert scratch is not None, f"products of {dlogits.dtype} operands are added through scratch"
    for rows in _slices(gradient.shape[0], scratch.shape[0]):
        part = scratch[: rows.stop - rows.start]
        _mm(dlogits[:, rows].t(), hidden, part)
        gradient[rows].add_(part)


def _multiplies_natively(weight: Tensor) -> bool:
    """Whether matrix products take operands of the weight's dtype and return ``compute_dtype``.

    float16 is upcast even where it could be multiplied: the logits' gradient underflows in it.
    """
    if weight.dtype == compute_dtype(weight):
        return True
    return weight.is_cuda and weight.dtype == torch.bfloat16 and "dtype_out" in torch.ops.aten.mm.overloads()


def _mm(left: Tensor, right: Tensor, out: Tensor) -> None:
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def _upcast(weight: Tensor, scratch: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight in ``compute_dtype``, in scratch that the next ones overwrite: use them before going on."""
    assert scratch is not None, f"a {weight.dtype} weight is upcast in scratch"
    for rows in _slices(weight.shape[0], scratch.shape[0]):
        yield rows, scratch[: rows.stop - rows.start].copy_(weight[rows])


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
