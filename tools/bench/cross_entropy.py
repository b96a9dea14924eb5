"""Cross-entropy of labels: the fused loss of sft and grpo, and the ways of computing the same.

Every implementation returns the mean over the rows, from which autograd makes the gradients of the hidden states and of
the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from copsd_kernels import reference
from copsd_tools.bench.cases import Case, Inputs
from copsd_tools.bench.implementation import (
    FusedOptions,
    Implementation,
    Subject,
    fused_implementations,
    missing_package,
    refuses_tensor_parallel,
    scratch_bytes,
    vocab_group,
)
from megatron_copsd.loss.cross_entropy import fused_linear_cross_entropy

CHECKPOINTED_ROWS = 256


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


def _dense(case: Case, inputs: Inputs, chunk: int | None) -> Tensor:
    return _dense_rows(inputs.student_hidden, inputs.weight, inputs.labels, case.spec.temperature) / len(inputs.labels)


def _dense_compiled(case: Case, inputs: Inputs, chunk: int | None) -> Tensor:
    loss = _compiled_dense_rows()(inputs.student_hidden, inputs.weight, inputs.labels, case.spec.temperature)
    return loss / len(inputs.labels)


@functools.cache
def _compiled_dense_rows() -> Callable[..., Tensor]:
    return torch.compile(_dense_rows, dynamic=False)


def _checkpointed(case: Case, inputs: Inputs, chunk: int | None) -> Tensor:
    """Dense, a chunk of rows at a time, whose logits are made again in the backward pass: 4 products instead of 3."""
    losses = [
        checkpoint(_dense_rows, hidden, inputs.weight, labels, case.spec.temperature, use_reentrant=False)
        for hidden, labels in zip(inputs.student_hidden.split(chunk), inputs.labels.split(chunk), strict=True)
    ]
    return torch.stack(losses).sum() / len(inputs.labels)


def _torch_chunked(case: Case, inputs: Inputs, chunk: int | None) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return functional.linear_cross_entropy(inputs.student_hidden, inputs.weight, inputs.labels, options=options)


def _liger_fused(case: Case, inputs: Inputs, chunk: int | None) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(inputs.weight, inputs.student_hidden, inputs.labels)


def _cce(case: Case, inputs: Inputs, chunk: int | None, *, impl: str = "cce") -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(inputs.student_hidden, inputs.weight, inputs.labels, impl=impl)


def _dense_rows(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ weight.t()).to(torch.promote_types(weight.dtype, torch.float32))
    return functional.cross_entropy(logits if temperature == 1 else logits / temperature, labels, reduction="sum")


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
    "cross-entropy of labels (sft, grpo), forward and backward",
    views=1,
    differentiated=True,
    outputs=("hidden", "weight"),
    exact=_exact,
    implementations={
        **fused_implementations("fused_linear_cross_entropy", _fused, views=1),
        "dense": Implementation(
            "eager autograd: logits, torch's cross_entropy",
            _dense,
            refuses_tensor_parallel,
            dense_rows=lambda case: case.rows,
        ),
        "dense_compiled": Implementation(
            "torch.compile of dense",
            _dense_compiled,
            refuses_tensor_parallel,
            compiles=True,
            dense_rows=lambda case: case.rows,
        ),
        "torch_chunked": Implementation("torch's linear_cross_entropy in chunks", _torch_chunked, _torch_refuses),
        "liger_fused": Implementation("Liger's fused_linear_cross_entropy (Triton)", _liger_fused, _liger_refuses),
        "cce": Implementation(
            "Apple's cut_cross_entropy (Triton)",
            _cce,
            _cce_refuses,
            extra_units=lambda case: 1,
            dense_rows=lambda case: 0,
        ),
        "cce_compiled": Implementation(
            "the same package's impl torch_compile",
            functools.partial(_cce, impl="torch_compile"),
            _cce_compiled_refuses,
            compiles=True,
            dense_rows=lambda case: case.rows,
        ),
        "checkpointed": Implementation(
            "dense in chunks of rows, each under torch.utils.checkpoint",
            _checkpointed,
            refuses_tensor_parallel,
            chunks=(CHECKPOINTED_ROWS,),
            extra_units=lambda case: 1,
            dense_rows=lambda case: min(CHECKPOINTED_ROWS, case.rows),
        ),
    },
)
