"""Cross-entropy of labels: the fused loss of sft and grpo, and the ways of computing the same.

Every implementation returns the mean over the rows, from which autograd makes the gradients of the hidden states and of
the weight.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from copsd_kernels import reference
from copsd_tools.bench.kernels.cases import Case, Inputs
from copsd_tools.bench.kernels.subjects.implementation import (
    FusedOptions,
    Implementation,
    Subject,
    dense_implementations,
    dense_in_chunks,
    fused_implementations,
    missing_package,
    refuses_tensor_parallel,
    scratch_bytes,
    vocab_group,
)
from megatron_copsd.loss.cross_entropy import fused_linear_cross_entropy


def _fused(options: FusedOptions, case: Case, inputs: Inputs) -> Tensor:
    return fused_linear_cross_entropy(
        inputs.student_hidden,
        inputs.weight,
        inputs.labels,
        inputs.row_weights,
        inputs.shard,
        group=vocab_group(case),
        temperature=case.spec.temperature,
        scratch_bytes=scratch_bytes(case),
        implementation=options.implementation,
        gradient_options=options.gradient_options,
    ).loss


def _exact(case: Case, inputs: Inputs) -> Tensor:
    logits = inputs.student_hidden @ inputs.weight.t()
    return -reference.token_log_prob(logits, inputs.labels, temperature=case.spec.temperature).mean()


def _dense_arguments(case: Case, inputs: Inputs) -> tuple[Tensor | float, ...]:
    return inputs.student_hidden, inputs.weight, inputs.labels, case.spec.temperature, len(inputs.labels)


def _checkpointed(case: Case, inputs: Inputs, chunk: int | None) -> Tensor:
    """Dense, a chunk of rows at a time, whose logits are made again in the backward pass: 4 products instead of 3."""
    chunks = zip(inputs.student_hidden.split(chunk), inputs.labels.split(chunk), strict=True)
    temperature, rows = case.spec.temperature, len(inputs.labels)
    losses = [
        checkpoint(_dense_rows, hidden, inputs.weight, labels, temperature, rows, use_reentrant=False)
        for hidden, labels in chunks
    ]
    return torch.stack(losses).sum()


def _torch_chunked(case: Case, inputs: Inputs, chunk: int | None) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return functional.linear_cross_entropy(inputs.student_hidden, inputs.weight, inputs.labels, options=options)


def _liger_fused(case: Case, inputs: Inputs, chunk: int | None) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(inputs.weight, inputs.student_hidden, inputs.labels)


def _cce(case: Case, inputs: Inputs, chunk: int | None, *, impl: str = "cce") -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(inputs.student_hidden, inputs.weight, inputs.labels, impl=impl)


def _dense_rows(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, rows: int) -> Tensor:
    logits = (hidden @ weight.t()).to(torch.promote_types(weight.dtype, torch.float32))
    scaled = logits if temperature == 1 else logits / temperature
    return functional.cross_entropy(scaled, labels, reduction="sum") / rows


def _plain_refuses(case: Case) -> str | None:
    """What the losses of other packages have in common."""
    if case.spec.temperature != 1:
        return "does not offer temperature"
    return refuses_tensor_parallel(case)


def _torch_refuses(case: Case) -> str | None:
    if not hasattr(functional, "linear_cross_entropy"):
        return f"torch {torch.__version__} does not have it: torch 2.13 does"
    return _plain_refuses(case)


def _liger_refuses(case: Case) -> str | None:
    return missing_package("liger_kernel", "liger-kernel") or _triton_refuses(case)


def _cce_refuses(case: Case) -> str | None:
    half = "takes float16 and bfloat16 hidden states" if case.dtype == "float32" else None
    return missing_package("cut_cross_entropy", "cut-cross-entropy") or _triton_refuses(case) or half


def _cce_compiled_refuses(case: Case) -> str | None:
    return missing_package("cut_cross_entropy", "cut-cross-entropy") or _plain_refuses(case)


def _triton_refuses(case: Case) -> str | None:
    return _plain_refuses(case) or ("its Triton kernels need a CUDA device" if case.device != "cuda" else None)


SUBJECT = Subject(
    views=1,
    differentiated=True,
    outputs=("hidden", "weight"),
    exact=_exact,
    implementations={
        **fused_implementations(_fused, views=1),
        **dense_implementations(_dense_rows, _dense_arguments),
        "torch_chunked": Implementation(_torch_chunked, _torch_refuses),
        "liger_fused": Implementation(_liger_fused, _liger_refuses),
        "cce": Implementation(
            _cce,
            _cce_refuses,
            extra_units=lambda case: 1,
            dense_rows=lambda case: 0,
        ),
        "cce_compiled": Implementation(
            functools.partial(_cce, impl="torch_compile"),
            _cce_compiled_refuses,
            compiles=True,
            dense_rows=lambda case: case.rows,
        ),
        "checkpointed": dense_in_chunks(_checkpointed, extra_units=1),
    },
)
