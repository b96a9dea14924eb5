"""What is measured: one shape and setting of the loss, and its inputs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from copsd_tools.bench.kernels.catalogue import What
from megatron_copsd.loss.divergence import DivergenceSpec
from megatron_copsd.types import VocabShard


@dataclass(frozen=True)
class Case:
    """One shape and setting of the loss.

    Attributes:
        rows: response rows R.
        hidden: hidden size H.
        vocab: vocabulary V.
        what: is computed.
        dtype: of hidden states and weight, a torch dtype's name.
        spec: which divergence; of the others, the temperature alone.
        frozen_weight: no gradient for the weight, as under LoRA.
        scratch_mb: loss.scratch_mb of the fused loss; None for its own default.
        tensor_parallel: ranks that share the vocabulary.
        device: cpu or cuda.
        threads: torch threads of each process.
        seed: of the inputs.
    """

    rows: int
    hidden: int
    vocab: int
    what: What = "divergence"
    dtype: str = "float32"
    spec: DivergenceSpec = field(default_factory=DivergenceSpec)
    frozen_weight: bool = False
    scratch_mb: float | None = None
    tensor_parallel: int = 1
    device: str = "cpu"
    threads: int = 1
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return getattr(torch, self.dtype)

    @property
    def local_vocab(self) -> int:
        """Rows of each rank's shard of the weight, padding included."""
        return -(-self.vocab // self.tensor_parallel)

    def shard(self, rank: int) -> VocabShard:
        """What one rank's rows of the weight are."""
        return VocabShard(rank * self.local_vocab, self.local_vocab, self.vocab)


@dataclass(frozen=True)
class Inputs:
    """What every implementation is given; leaves of autograd where a gradient is wanted.

    Attributes:
        student_hidden: [R, H], a leaf.
        teacher_hidden: [R, H].
        weight: [V_local, H], a leaf unless frozen.
        labels: [R] int64, uniform in the vocabulary.
        row_weights: [R] float32, all 1 / R: the mean is what every implementation can compute.
        shard: what the rows of ``weight`` are.
    """

    student_hidden: Tensor
    teacher_hidden: Tensor
    weight: Tensor
    labels: Tensor
    row_weights: Tensor
    shard: VocabShard

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors whose gradients are asked for, hidden states first."""
        return [tensor for tensor in (self.student_hidden, self.weight) if tensor.requires_grad]


def make_inputs(case: Case, rank: int = 0) -> Inputs:
    """Logits of standard deviation 3, and a teacher close enough to the student to be worth distilling from."""
    generator = torch.Generator(case.device).manual_seed(case.seed)
    student = _normal(case, generator, case.rows)
    teacher = _normal(case, generator, case.rows, scale=0.2).add_(student)
    return Inputs(
        student_hidden=student.requires_grad_(),
        teacher_hidden=teacher,
        weight=make_weight(case, rank).requires_grad_(not case.frozen_weight),
        labels=torch.randint(case.vocab, (case.rows,), generator=generator, device=case.device),
        row_weights=torch.full((case.rows,), 1 / case.rows, device=case.device),
        shard=case.shard(rank),
    )


def make_weight(case: Case, rank: int) -> Tensor:
    """One rank's shard [V_local, H] of the weight, made without the others': memory is measured above it."""
    generator = torch.Generator(case.device).manual_seed(case.seed + 1 + rank)
    return _normal(case, generator, case.local_vocab, scale=3 * case.hidden**-0.5)


def first_rows(inputs: Inputs, rows: int) -> Inputs:
    """The same inputs cut to their first rows, the mean being over these."""
    return replace(
        inputs,
        student_hidden=inputs.student_hidden.detach()[:rows].clone().requires_grad_(),
        teacher_hidden=inputs.teacher_hidden[:rows],
        labels=inputs.labels[:rows],
        row_weights=torch.full_like(inputs.row_weights[:rows], 1 / rows),
    )


def _normal(case: Case, generator: torch.Generator, rows: int, scale: float = 1.0) -> Tensor:
    shape, dtype = (rows, case.hidden), case.torch_dtype
    return torch.randn(shape, generator=generator, dtype=dtype, device=case.device).mul_(scale)
