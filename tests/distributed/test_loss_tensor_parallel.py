"""Fused losses over a vocabulary cut among Gloo ranks, against the whole vocabulary in one process.

Each group of ranks is started once and works through all cases; every rank checks its own shard, and the tests read
what the ranks found.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from divergence_cases import KINDS
from torch import Tensor

from megatron_copsd.loss.autograd import DEFAULT_GRADIENT_OPTIONS, GradientOptions
from megatron_copsd.loss.cross_entropy import CrossEntropyResult, fused_linear_cross_entropy
from megatron_copsd.loss.divergence import DivergenceResult, DivergenceSpec, fused_linear_divergence
from megatron_copsd.loss.implementation import Implementation
from megatron_copsd.types import VocabShard

ROWS, HIDDEN, VOCAB = 13, 7, 37
SCRATCH_BYTES = 16_000

# Rows of each rank's shard, by number of ranks: the last shard is cut short, or shards are padding alone.
LAYOUTS = {1: (37,), 2: (20, 40), 3: (13, 16, 37)}
SPECS = {
    f"{kind}, {clip_name}": replace(DivergenceSpec(kind, jsd_weight=0.3, temperature=0.7), **clips)
    for kind in KINDS
    for clip_name, clips in {
        "no clip": {},
        "entry clip": {"entry_clip": 0.05},
        "token clip": {"token_clip": 0.3},
        "both clips": {"entry_clip": 0.05, "token_clip": 0.3},
    }.items()
}
CASES = (*SPECS, "cross_entropy")
TRITON_CASES = ("forward_kl, no clip", "reverse_kl, no clip", "jsd, both clips", "cross_entropy")
TRITON_IMPLEMENTATIONS: tuple[Implementation, ...] = ("chunk", "streaming")

Loss = Callable[["Inputs", VocabShard, "dist.ProcessGroup | None"], DivergenceResult | CrossEntropyResult]


@dataclass(frozen=True)
class Inputs:
    """Rows, and the rows of the weight that one rank holds."""

    student: Tensor
    teacher: Tensor
    weight: Tensor
    labels: Tensor
    row_weights: Tensor

    def cut(self, shard: VocabShard) -> Inputs:
        """The same with this shard of the weight; its padding is NaN, which must never be read."""
        weight = torch.full((shard.rows, HIDDEN), torch.nan, dtype=self.weight.dtype)
        weight[: shard.valid] = self.weight[shard.start : shard.start + shard.valid]
        return replace(self, student=self.student.clone().requires_grad_(), weight=weight.requires_grad_())


def make_inputs(dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(11)
    student = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64)
    teacher = student + 0.5 * torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCAB, (ROWS,), generator=generator)
    labels[:2] = torch.tensor([0, VOCAB - 1])
    return Inputs(student.to(dtype), teacher.to(dtype), weight.to(dtype), labels, torch.rand(ROWS, generator=generator))


def loss_of(
    case: str,
    implementation: Implementation = "torch",
    gradient_options: GradientOptions = DEFAULT_GRADIENT_OPTIONS,
) -> Loss:
    if case == "cross_entropy":
        return lambda x, shard, group: fused_linear_cross_entropy(
            x.student, x.weight, x.labels, x.row_weights, shard, group=group, temperature=0.7,
            scratch_bytes=SCRATCH_BYTES, implementation=implementation, gradient_options=gradient_options,
        )  # fmt: skip
    return lambda x, shard, group: fused_linear_divergence(
        x.student, x.teacher, x.weight, SPECS[case], x.row_weights, shard, group=group,
        scratch_bytes=SCRATCH_BYTES, implementation=implementation, gradient_options=gradient_options,
    )  # fmt: skip


def check_case(case: str, shard_rows: int, group: dist.ProcessGroup) -> dict[str, bool]:
    """Whether each property of one case holds on this rank."""
    shard = VocabShard(dist.get_rank(group) * shard_rows, shard_rows, VOCAB)
    loss, whole = loss_of(case), make_inputs(torch.float64)
    wanted_inputs, inputs = whole.cut(VocabShard(0, VOCAB, VOCAB)), whole.cut(shard)
    wanted, found = loss(wanted_inputs, VocabShard(0, VOCAB, VOCAB), None), loss(inputs, shard, group)
    wanted_gradients = torch.autograd.grad(wanted.loss, (wanted_inputs.student, wanted_inputs.weight))
    gradients = torch.autograd.grad(found.loss, (inputs.student, inputs.weight))
    wanted_weight_gradient = torch.zeros(shard_rows, HIDDEN, dtype=torch.float64)
    wanted_weight_gradient[: shard.valid] = wanted_gradients[1][shard.start : shard.start + shard.valid]
    checks = {
        "value": all(
            torch.allclose(getattr(found, field.name), getattr(wanted, field.name), rtol=1e-6, atol=1e-7)
            for field in fields(found)
        )
        and torch.allclose(found.loss, wanted.loss, rtol=1e-12),
        "gradient": torch.allclose(gradients[0], wanted_gradients[0], rtol=1e-10, atol=1e-13)
        and torch.allclose(gradients[1], wanted_weight_gradient, rtol=1e-10, atol=1e-13),
        "same on all ranks": same_on_all_ranks(found.loss, group) and same_on_all_ranks(gradients[0], group),
    }
    frozen = replace(whole.cut(shard), weight=inputs.weight.detach())
    (hidden_gradient,) = torch.autograd.grad(loss(frozen, shard, group).loss, (frozen.student,))
    checks["frozen weight"] = torch.equal(hidden_gradient, gradients[0])
    checks |= check_gradient_options(case, inputs, shard, group, gradients)
    empty = replace(
        inputs,
        student=inputs.student[:0],
        teacher=inputs.teacher[:0],
        labels=inputs.labels[:0],
        row_weights=inputs.row_weights[:0],
    )
    nothing = loss(empty, shard, group).loss
    checks["no rows"] = bool(nothing == 0) and not torch.autograd.grad(nothing, (inputs.weight,))[0].any()
    checks["equal inputs give zero"] = case == "cross_entropy" or all(
        equal_inputs_give_zero(loss, shard, group, dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    return checks


def check_gradient_options(
    case: str, inputs: Inputs, shard: VocabShard, group: dist.ProcessGroup, wanted: tuple[Tensor, ...]
) -> dict[str, bool]:
    """Recomputed gradients are the same bits; partial ones of the hidden states sum to the whole, also scattered."""
    leaves = inputs.student, inputs.weight
    again = loss_of(case, gradient_options=GradientOptions(recompute=True))(inputs, shard, group).loss
    recomputed = torch.autograd.grad(again, leaves)
    own = loss_of(case, gradient_options=GradientOptions(partial_hidden_gradient=True))(inputs, shard, group).loss
    (partial,) = torch.autograd.grad(own, inputs.student)
    # What sequence parallelism does: each rank keeps the sum of its own rows.
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    rows = slice(rank * (ROWS // world), (rank + 1) * (ROWS // world))
    pieces = [torch.empty_like(partial[rows]) for _ in range(world)]
    dist.all_to_all(pieces, list(partial[: world * (ROWS // world)].chunk(world)), group=group)
    return {
        "recomputed": all(torch.equal(a, b) for a, b in zip(recomputed, wanted, strict=True)),
        "reduce-scattered": torch.allclose(torch.stack(pieces).sum(0), wanted[0][rows], rtol=1e-10, atol=1e-13),
    }


def check_triton(
    case: str, implementation: Implementation, shard_rows: int, group: dist.ProcessGroup
) -> dict[str, bool]:
    """An implementation in Triton, interpreted, in float32, against plain torch in float64 on the whole vocabulary."""
    shard = VocabShard(dist.get_rank(group) * shard_rows, shard_rows, VOCAB)
    exact_inputs = make_inputs(torch.float64).cut(VocabShard(0, VOCAB, VOCAB))
    exact = loss_of(case)(exact_inputs, VocabShard(0, VOCAB, VOCAB), None).loss
    wanted = torch.autograd.grad(exact, (exact_inputs.student, exact_inputs.weight))
    inputs = make_inputs(torch.float32).cut(shard)
    found = loss_of(case, implementation)(inputs, shard, group)
    hidden, weight = (g.double() for g in torch.autograd.grad(found.loss, (inputs.student, inputs.weight)))
    wanted_weight = wanted[1][shard.start : shard.start + shard.valid]
    return {
        f"{implementation}: value": torch.allclose(found.loss.double(), exact, rtol=1e-5),
        f"{implementation}: gradient": torch.allclose(hidden, wanted[0], rtol=1e-4, atol=1e-6)
        and torch.allclose(weight[: shard.valid], wanted_weight, rtol=1e-4, atol=1e-6)
        and not weight[shard.valid :].any(),
        f"{implementation}: same on all ranks": same_on_all_ranks(found.loss, group)
        and same_on_all_ranks(hidden, group),
    }


def equal_inputs_give_zero(loss: Loss, shard: VocabShard, group: dist.ProcessGroup, dtype: torch.dtype) -> bool:
    inputs = make_inputs(dtype).cut(shard)
    result = loss(replace(inputs, teacher=inputs.student.detach().clone()), shard, group)
    gradients = torch.autograd.grad(result.loss, (inputs.student, inputs.weight))
    values = (result.loss, result.token_divergence, *gradients)
    return all(not value.isnan().any() and not value.any() for value in values)


def same_on_all_ranks(value: Tensor, group: dist.ProcessGroup) -> bool:
    value = value.detach().contiguous()
    others = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(others, value, group=group)
    return all(torch.equal(other, value) for other in others)


def work(rank: int, world: int, folder: str) -> None:
    """One rank: every case in every layout of this world size; what was found goes to a file."""
    torch.set_num_threads(1)
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which no rank has done yet
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    group = dist.new_group(list(range(world)))
    found = {(case, rows): check_case(case, rows, group) for case in CASES for rows in LAYOUTS[world]}
    for case, implementation, rows in itertools.product(TRITON_CASES, TRITON_IMPLEMENTATIONS, LAYOUTS[world]):
        found[case, rows] |= check_triton(case, implementation, rows, group)
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda ranks: f"{ranks} ranks")
def findings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each rank of one group found."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, args=(world, str(folder)), nprocs=world)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.parametrize("case", CASES)
def test_a_cut_vocabulary_gives_the_same(findings, case):
    failed = [
        f"rank {rank}, shards of {rows} rows: {check}"
        for rank, found in enumerate(findings)
        for (name, rows), checks in found.items()
        for check, passed in checks.items()
        if name == case and not passed
    ]
    assert not failed
