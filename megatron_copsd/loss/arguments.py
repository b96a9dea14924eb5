"""What both fused losses check of a call, before any work: see ``copsd_kernels.arguments``."""

from __future__ import annotations

from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor

from copsd_kernels.arguments import EXACT, FLOATING, Arguments
from copsd_kernels.gemm import compute_dtype
from megatron_copsd.loss.autograd import GradientOptions
from megatron_copsd.loss.implementation import Implementation
from megatron_copsd.loss.spec import DivergenceSpec
from megatron_copsd.types import VocabShard


def check_layer(
    check: Arguments,
    weight: Tensor,
    shard: VocabShard,
    group: dist.ProcessGroup | None,
    scratch_bytes: int | None,
    implementation: Implementation,
    gradient_options: GradientOptions,
) -> None:
    """Check the output layer, and how the loss is computed; hidden states and rows are checked behind it.

    Raises:
        UserError: an argument breaks its rule.
    """
    check.tensor("weight", weight, "V_local H", FLOATING)
    check.instance("shard", shard, VocabShard)
    check.integer("shard.vocab_size", shard.vocab_size, 1)
    check.integer("shard.rows", shard.rows, check.size("V_local"), check.size("V_local"))
    if group is not None:
        check.instance("group", group, dist.ProcessGroup)
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    # A softmax over a part of the vocabulary would be another loss, with no sign of it.
    check.integer("shard.start", shard.start, rank * shard.rows, rank * shard.rows)
    if shard.rows * ranks < shard.vocab_size:
        rule = f"{ranks} shards of {shard.rows} rows must hold all {shard.vocab_size} entries of the vocabulary"
        check.refuse("shard", shard, rule, "Pass the whole output weight, or the group of all ranks that share it.")
    if scratch_bytes is not None:
        check.integer("scratch_bytes", scratch_bytes, 1)
    check.choice("implementation", implementation, get_args(Implementation))
    check.instance("gradient_options", gradient_options, GradientOptions)
    for name in ("recompute", "partial_hidden_gradient"):
        check.instance(f"gradient_options.{name}", getattr(gradient_options, name), bool)
    given = gradient_options.weight_gradient
    if given is not None:
        check.tensor("gradient_options.weight_gradient", given, "V_local H", (compute_dtype(weight),))


def check_spec(check: Arguments, spec: DivergenceSpec, vocab_size: int) -> None:
    """Check which divergence it is; its own numbers it has checked itself.

    Raises:
        UserError: it breaks a rule.
    """
    check.instance("spec", spec, DivergenceSpec)
    if spec.teacher_top_k is not None:
        check.integer("spec.teacher_top_k", spec.teacher_top_k, 1, vocab_size)


def check_rows(check: Arguments, row_weights: Tensor) -> None:
    """Check the rows' weights; the values of those on the host too, which nothing has to wait for.

    Raises:
        UserError: they break a rule.
    """
    check.tensor("row_weights", row_weights, "R", EXACT, constant=True)
    if row_weights.device.type == "cpu" and not row_weights.isfinite().all():
        row = int((~row_weights.isfinite()).nonzero()[0])
        check.refuse("row_weights", float(row_weights[row]), f"row {row}: must be finite", "Leave the row out.")


def check_labels(check: Arguments, labels: Tensor, vocab_size: int) -> None:
    """Check the labels; on CUDA a value out of range ends the process asynchronously, so that nothing waits for it.

    Raises:
        UserError: they break a rule.
    """
    check.tensor("labels", labels, "R", (torch.int64,))
    inside = (labels >= 0) & (labels < vocab_size)
    if labels.device.type != "cpu":
        torch._assert_async(inside.all(), "a label is not in the vocabulary")
    elif not inside.all():
        row = int((~inside).nonzero()[0])
        check.refuse("labels", int(labels[row]), f"row {row}: must be at least 0 and below {vocab_size}", "Correct it.")
