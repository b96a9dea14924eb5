"""Log-probability of each row's label and entropy of each row, forward alone: for grpo and engine agreement."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from copsd_kernels import reference
from copsd_tools.bench.cases import Case, Inputs
from copsd_tools.bench.implementation import (
    FusedOptions,
    Implementation,
    Subject,
    fused_implementations,
    refuses_tensor_parallel,
    scratch_bytes,
    vocab_group,
)
from megatron_copsd.loss.cross_entropy import fused_linear_cross_entropy

CHUNKED_ROWS = 256


def _fused(options: FusedOptions, case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    result = fused_linear_cross_entropy(
        inputs.student_hidden,
        inputs.weight,
        inputs.labels,
        inputs.row_weights,
        inputs.shard,
        group=vocab_group(case),
        temperature=case.spec.temperature,
        scratch_bytes=scratch_bytes(case),
        implementation=options.implementation,
    )
    return result.token_log_probs, result.entropy


def _exact(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    logits, temperature = inputs.student_hidden @ inputs.weight.t(), case.spec.temperature
    log_probs = reference.token_log_prob(logits, inputs.labels, temperature=temperature)
    return log_probs, reference.entropy(logits, temperature=temperature)


def _dense(case: Case, inputs: Inputs, chunk: int | None) -> tuple[Tensor, Tensor]:
    return _dense_rows(inputs.student_hidden, inputs.weight, inputs.labels, case.spec.temperature)


def _dense_compiled(case: Case, inputs: Inputs, chunk: int | None) -> tuple[Tensor, Tensor]:
    return _compiled_dense_rows()(inputs.student_hidden, inputs.weight, inputs.labels, case.spec.temperature)


@functools.cache
def _compiled_dense_rows() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_dense_rows, dynamic=False)


def _dense_chunked(case: Case, inputs: Inputs, chunk: int | None) -> tuple[Tensor, Tensor]:
    parts = [
        _dense_rows(hidden, inputs.weight, labels, case.spec.temperature)
        for hidden, labels in zip(inputs.student_hidden.split(chunk), inputs.labels.split(chunk), strict=True)
    ]
    log_probs, entropies = zip(*parts, strict=True)
    return torch.cat(log_probs), torch.cat(entropies)


def _dense_rows(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = (hidden @ weight.t()).to(torch.promote_types(weight.dtype, torch.float32))
    # One log_softmax for both, as one would write it; the oracle's functions make one each.
    log_softmax = torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
    return log_softmax.gather(1, labels[:, None])[:, 0], -(log_softmax.exp() * log_softmax).sum(dim=-1)


SUBJECT = Subject(
    "log-probability of labels and entropy (grpo, engine agreement), forward alone",
    views=1,
    differentiated=False,
    outputs=("log_prob", "entropy"),
    exact=_exact,
    implementations={
        **fused_implementations("fused_linear_cross_entropy without gradients", _fused),
        "dense": Implementation(
            "all logits: log_softmax, gather, sum", _dense, refuses_tensor_parallel, dense_rows=lambda case: case.rows
        ),
        "dense_compiled": Implementation(
            "torch.compile of dense",
            _dense_compiled,
            refuses_tensor_parallel,
            compiles=True,
            dense_rows=lambda case: case.rows,
        ),
        "dense_chunked": Implementation(
            "dense in chunks of rows",
            _dense_chunked,
            refuses_tensor_parallel,
            chunks=(CHUNKED_ROWS,),
            dense_rows=lambda case: min(CHUNKED_ROWS, case.rows),
        ),
    },
)
