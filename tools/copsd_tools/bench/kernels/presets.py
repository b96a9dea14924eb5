"""The sets of cases that have a name, and how cases vary; nothing heavy is imported, since the help lists them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from copsd_kernels.reference import DivergenceKind
    from copsd_tools.bench.kernels.cases import Case


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
    kinds: tuple[DivergenceKind, ...] = ("forward_kl",)
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


KINDS: tuple[DivergenceKind, ...] = ("forward_kl", "reverse_kl", "jsd")
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
