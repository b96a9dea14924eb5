"""The divergence: the fused loss, and the ways of computing the same that one would otherwise use.

Every implementation is given the same inputs and returns the mean divergence over the rows as a scalar from which
autograd makes the gradients of the student's hidden states and of the weight.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
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
from megatron_copsd.loss.divergence import DivergenceSpec, fused_linear_divergence

LIGER_CHUNK = 1024  # Liger's default


def _fused(options: FusedOptions, case: Case, inputs: Inputs) -> Tensor:
    return fused_linear_divergence(
        inputs.student_hidden,
        inputs.teacher_hidden,
        inputs.weight,
        case.spec,
        inputs.row_weights,
        inputs.shard,
        group=vocab_group(case),
        scratch_bytes=scratch_bytes(case),
        implementation=options.implementation,
        gradient_options=options.gradient_options,
    ).loss


def _exact(case: Case, inputs: Inputs) -> Tensor:
    return _dense_rows(*_dense_arguments(case, inputs))


def _dense_arguments(case: Case, inputs: Inputs) -> tuple[Tensor | DivergenceSpec, ...]:
    return inputs.student_hidden, inputs.teacher_hidden, inputs.weight, inputs.row_weights, case.spec


def _checkpointed(case: Case, inputs: Inputs, chunk: int | None) -> Tensor:
    """Dense, a chunk of rows at a time, whose logits are made again in the backward pass: 6 products instead of 4."""
    chunks = (inputs.student_hidden, inputs.teacher_hidden, inputs.row_weights)
    losses = [
        checkpoint(_dense_rows, student, teacher, inputs.weight, row_weights, case.spec, use_reentrant=False)
        for student, teacher, row_weights in zip(*(tensor.split(chunk) for tensor in chunks), strict=True)
    ]
    return torch.stack(losses).sum()


def _liger_fused(case: Case, inputs: Inputs, chunk: int | None) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=_liger_beta(case.spec), temperature=case.spec.temperature)
    return loss(inputs.student_hidden, inputs.weight, inputs.teacher_hidden, inputs.weight.detach(), None)


def _liger_chunked(case: Case, inputs: Inputs, chunk: int | None, *, compiled: bool = True) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=_liger_beta(case.spec),
        temperature=case.spec.temperature,
        compiled=compiled,
        chunk_size=chunk,
    )
    labels = torch.zeros(len(inputs.row_weights), dtype=torch.int64, device=inputs.weight.device)  # none is ignored
    return loss(inputs.student_hidden, inputs.weight, inputs.teacher_hidden, inputs.weight.detach(), labels)


def _liger_beta(spec: DivergenceSpec) -> float:
    """Both of Liger's losses take the teacher's weight in the mixture, and KLs at its ends that are not its limits."""
    return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": spec.jsd_weight}[spec.kind]


def divergence(spec: DivergenceSpec, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The oracle's divergence of each row, [R], with the settings of ``spec``."""
    return reference.divergence(
        student_logits,
        teacher_logits,
        spec.kind,
        jsd_weight=spec.jsd_weight,
        temperature=spec.temperature,
        entry_clip=spec.entry_clip,
        token_clip=spec.token_clip,
    )


def _dense_rows(
    student_hidden: Tensor, teacher_hidden: Tensor, weight: Tensor, row_weights: Tensor, spec: DivergenceSpec
) -> Tensor:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        teacher_logits = (teacher_hidden @ weight.t()).to(dtype)
    student_logits = (student_hidden @ weight.t()).to(dtype)
    return (row_weights * divergence(spec, student_logits, teacher_logits)).sum()


def _liger_refuses(case: Case) -> str | None:
    missing = missing_package("liger_kernel", "liger-kernel")
    if missing is not None:
        return missing
    for name in ("entry_clip", "token_clip"):
        if getattr(case.spec, name) is not None:
            return f"does not offer {name}"
    return refuses_tensor_parallel(case)


def _liger_fused_refuses(case: Case) -> str | None:
    return _liger_refuses(case) or ("its Triton kernels need a CUDA device" if case.device != "cuda" else None)


def _liger_chunked_extra_units(case: Case) -> int:
    """It makes the weight's gradient even where the weight is frozen."""
    return 1 if case.frozen_weight else 0


SUBJECT = Subject(
    views=2,
    differentiated=True,
    outputs=("hidden", "weight"),
    exact=_exact,
    implementations={
        **fused_implementations(_fused, views=2),
        **dense_implementations(_dense_rows, _dense_arguments),
        "liger_fused": Implementation(_liger_fused, _liger_fused_refuses),
        "liger_chunked": Implementation(
            _liger_chunked,
            _liger_refuses,
            chunks=(LIGER_CHUNK,),
            compiles=True,
            extra_units=_liger_chunked_extra_units,
            dense_rows=lambda case: min(LIGER_CHUNK, case.rows),
        ),
        "liger_chunked_best": Implementation(
            _liger_chunked,
            _liger_refuses,
            chunks=(256, LIGER_CHUNK, 4096),  # each is compiled, which takes longer than the measurement
            compiles=True,
            extra_units=_liger_chunked_extra_units,
        ),
        "liger_chunked_eager": Implementation(
            functools.partial(_liger_chunked, compiled=False),
            _liger_refuses,
            chunks=(LIGER_CHUNK,),
            extra_units=_liger_chunked_extra_units,
            dense_rows=lambda case: min(LIGER_CHUNK, case.rows),
        ),
        "checkpointed": dense_in_chunks(_checkpointed, extra_units=2),
    },
)
