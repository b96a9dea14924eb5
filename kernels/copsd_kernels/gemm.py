"""Products with the output weight whose results are float32 (float64 for float64 weights), whatever the weight's dtype.

Rounding logits to bfloat16 ruins the gradient of a divergence between near-equal models (its relative error grows as
the divergence shrinks), so logits are never rounded. Where the hardware multiplies bfloat16 and returns the float32
accumulator, that is used; elsewhere the weight is upcast tile by tile into scratch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of logits and of accumulated gradients: float64 for a float64 weight, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def operand_dtype(weight: Tensor) -> torch.dtype:
    """Dtype that hidden states must have when they enter the products below."""
    return weight.dtype if _multiplies_natively(weight) else compute_dtype(weight)


def project(hidden: Sequence[Tensor], weight: Tensor, logits: Sequence[Tensor], tile: Tensor | None) -> None:
    """Write logits = hidden weight^T for each hidden; all go through the same calls, so equal inputs give equal bits.

    Args:
        hidden: each [C, H] of ``operand_dtype``, contiguous.
        weight: [V_local, H].
        logits: one [C, V_local] of ``compute_dtype`` for each hidden, overwritten.
        tile: [rows, H] scratch of ``compute_dtype``; None where the weight already has that dtype.
    """
    if _multiplies_natively(weight):
        for x, out in zip(hidden, logits, strict=True):
            _mm(x, weight.t(), out)
        return
    for columns, upcast in _tiles(weight, tile):
        for x, out in zip(hidden, logits, strict=True):
            torch.mm(x, upcast.t(), out=out[:, columns])


def write_hidden_gradient(dlogits: Tensor, weight: Tensor, gradient: Tensor, tile: Tensor | None) -> None:
    """Write gradient = dlogits weight, this shard's part of the hidden states' gradient.

    Args:
        dlogits: [C, V_local] of ``operand_dtype``.
        weight: [V_local, H].
        gradient: [C, H] of ``compute_dtype``, overwritten.
        tile: as for ``project``.
    """
    if _multiplies_natively(weight):
        _mm(dlogits, weight, gradient)
    else:
        add_hidden_gradient(dlogits, weight, gradient.zero_(), tile)


def add_hidden_gradient(dlogits: Tensor, weight: Tensor, gradient: Tensor, tile: Tensor | None) -> None:
    """Add dlogits weight to the hidden states' gradient, for some columns of the shard.

    Args:
        dlogits: [C, columns] of ``operand_dtype``.
        weight: [columns, H], the rows of the weight that belong to them.
        gradient: [C, H] of ``compute_dtype``, accumulated into.
        tile: [rows, H] scratch of ``compute_dtype``; None where the weight already has that dtype.
    """
    if weight.dtype == gradient.dtype:
        gradient.addmm_(dlogits, weight)
    elif dlogits.dtype == gradient.dtype:
        for columns, upcast in _tiles(weight, tile):
            gradient.addmm_(dlogits[:, columns], upcast)
    else:
        for rows in _slices(gradient.shape[0], tile.shape[0]):
            part = tile[: rows.stop - rows.start]
            _mm(dlogits[rows], weight, part)
            gradient[rows].add_(part)


def add_weight_gradient(dlogits: Tensor, hidden: Tensor, gradient: Tensor, tile: Tensor | None) -> None:
    """Add dlogits^T hidden to the weight's gradient.

    Args:
        dlogits: [C, V_local] of ``operand_dtype``.
        hidden: [C, H] of ``operand_dtype``.
        gradient: [V_local, H] of ``compute_dtype``, accumulated into.
        tile: [rows, H] scratch of ``compute_dtype``; needed where the operands have another dtype.
    """
    if dlogits.dtype == gradient.dtype:
        gradient.addmm_(dlogits.t(), hidden)
        return
    for rows in _slices(gradient.shape[0], tile.shape[0]):
        part = tile[: rows.stop - rows.start]
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


def _tiles(weight: Tensor, tile: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for rows in _slices(weight.shape[0], tile.shape[0]):
        yield rows, tile[: rows.stop - rows.start].copy_(weight[rows])


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
