"""What is measured: one shape and setting of the loss, its inputs, and the sets of cases that have a name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from megatron_copsd.loss.divergence import DivergenceSpec
from megatron_copsd.types import VocabShard

What = Literal["divergence", "cross_entropy", "log_probs"]

FLOOR = "gemm_floor"  # stands among the implementations in results: the matrix products alone


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


@dataclass(frozen=True)
class Sweep:
    """Cases that vary in what is listed, every combination of it.

    Attributes:
        shapes: (R, H, V) each.
        kinds: divergences.
        entry_clips: None for no clip.
        implementations: names; empty for all.
    """

    shapes: tuple[tuple[int, int, int], ...]
    kinds: tuple[str, ...] = ("forward_kl",)
    entry_clips: tuple[float | None, ...] = (None,)
    implementations: tuple[str, ...] = ()

    def cases(self, base: Case) -> list[Case]:
        """All combinations, other settings as in ``base``; kinds and clips are the divergence's alone."""
        if base.what != "divergence":
            return [replace(base, rows=r, hidden=h, vocab=v) for r, h, v in self.shapes]
        return [
            replace(base, rows=r, hidden=h, vocab=v, spec=replace(base.spec, kind=kind, entry_clip=clip))
            for (r, h, v), kind, clip in product(self.shapes, self.kinds, self.entry_clips)
        ]


@dataclass(frozen=True)
class Preset:
    """Named set of sweeps, and how often each of its cases is run."""

    dtype: str
    warmup: int
    repeats: int
    sweeps: tuple[Sweep, ...]


KINDS = ("forward_kl", "reverse_kl", "jsd")
# Output weights (H, V) of Qwen3-1.7B, Qwen3-4B, Qwen2.5-72B and Gemma-2-2B.
_GPU_WEIGHTS = ((2048, 151936), (2560, 151936), (8192, 152064), (2304, 256000))
_GPU_ROWS = (1024, 4096, 8192, 32768)
PRESETS = {
    "cpu": Preset("float32", 1, 5, (Sweep(((1024, 576, 49152), (2048, 1024, 151936))),)),
    "gpu": Preset(
        "bfloat16",
        10,
        30,
        (
            Sweep(((8192, 4096, 151936),), KINDS, (None, 0.05)),
            Sweep(tuple((rows, *weight) for weight in _GPU_WEIGHTS for rows in _GPU_ROWS)),
        ),
    ),
    "memory": Preset(
        "float32",
        1,
        3,
        (Sweep(tuple((256 << power, 64, 16384) for power in range(6)), implementations=("fused",)),),
    ),
}
