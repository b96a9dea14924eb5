"""Speeds of GPUs, by the names that ``--explain`` takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What a device can do at most.

    Attributes:
        name: for the table.
        tflops: of dense matrix products, in 1e12 operations a second, by the operands' dtype.
        gbytes: of its memory, in 1e9 bytes a second.
        memory: in 1e9 bytes.
    """

    name: str
    tflops: Mapping[str, float]
    gbytes: float
    memory: float


# NVIDIA's data sheets: SXM modules, bfloat16 without sparsity, float32 without TF32, which torch leaves off.
DEVICES = {
    "A100": Device("A100", {"bfloat16": 312, "float32": 19.5}, 2039, 80),
    "H100": Device("H100", {"bfloat16": 989, "float32": 67}, 3350, 80),
    "H200": Device("H200", {"bfloat16": 989, "float32": 67}, 4800, 141),
    "B200": Device("B200", {"bfloat16": 2250, "float32": 75}, 8000, 180),
}
