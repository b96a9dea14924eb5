"""Log-probability of each row's label and entropy of each row, forward alone: for grpo and engine agreement."""

from __future__ import annotations

import torch
from torch import Tensor

from copsd_kernels import reference
from copsd_tools.bench.kernels.cases import Case, Inputs
from copsd_tools.bench.kernels.subjects.implementation import (
    FusedOptions,
    Subject,
    dense_implementations,
    dense_in_chunks,
    fused_implementations,
    scratch_bytes,
    vocab_group,
)
from megatron_copsd.loss.cross_entropy import fused_linear_cross_entropy


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


def _dense_arguments(case: Case, inputs: Inputs) -> tuple[Tensor | float, ...]:
    return inputs.student_hidden, inputs.weight, inputs.labels, case.spec.temperature


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
    views=1,
    differentiated=False,
    outputs=("log_prob", "entropy"),
    exact=_exact,
    implementations={
        **fused_implementations(_fused),
        **dense_implementations(_dense_rows, _dense_arguments),
        "dense_chunked": dense_in_chunks(_dense_chunked),
    },
)
