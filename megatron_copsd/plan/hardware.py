"""What the planner knows of GPUs and links; ``docs/planner.md`` gives the source of each number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One GPU in a node of eight.

    Attributes:
        memory: bytes that a process sees.
        flops: dense bfloat16 FLOP/s of the tensor cores.
        memory_bandwidth: bytes/s of its memory.
        link: bytes/s to the other GPUs of the node, one direction.
        network: bytes/s to other nodes, one direction, of this GPU's share.
        host: bytes/s to the host's memory.
    """

    memory: int
    flops: float
    memory_bandwidth: float
    link: float
    network: float
    host: float


GPUS: Mapping[str, Gpu] = {
    "a100-80": Gpu(int(79.1 * _GIB), 312e12, 2.04e12, 300e9, 25e9, 32e9),
    "h100-80": Gpu(int(79.1 * _GIB), 989e12, 3.35e12, 450e9, 50e9, 64e9),
    "h200-141": Gpu(int(139.8 * _GIB), 989e12, 4.8e12, 450e9, 50e9, 64e9),
    "b200-180": Gpu(int(178.0 * _GIB), 2250e12, 8.0e12, 900e9, 50e9, 64e9),
}

GPUS_PER_NODE = 8

# How CUDA names them, e.g. "NVIDIA H100 80GB HBM3"; PCIe models have other clocks and are left out.
_CUDA_NAMES: Mapping[str, str] = {
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA A100-SXM4-40GB": "a100-80",
    "NVIDIA H100 80GB HBM3": "h100-80",
    "NVIDIA H200": "h200-141",
    "NVIDIA B200": "b200-180",
}


def peak_flops(cuda_name: str) -> float | None:
    """Return a device's dense bfloat16 FLOP/s from the name that CUDA gives it, or None where it is not known."""
    known = _CUDA_NAMES.get(cuda_name)
    return GPUS[known].flops if known else None


@dataclass(frozen=True)
class Assumptions:
    """Shares of the peaks above that real kernels and collectives reach, and memory that no formula gives.

    Attributes:
        gemm, expert_gemm: of ``flops``, large matrix products, and the grouped ones of experts.
        attention: of ``flops``, causal attention, forward and backward.
        memory_bandwidth: of it, streaming kernels and decoding.
        link, network, host: of those bandwidths, large messages.
        latency: seconds of one collective or message.
        layer: seconds that one layer takes at least for one microbatch's forward pass, however small; an expert layer
            takes three times that.
        decode_layer, eager_layer: seconds that one layer of one decoding step takes at least, in a server with CUDA
            graphs and in transformers' ``generate``.
        framework: bytes of CUDA context, NCCL's buffers, cuBLAS's workspaces and Triton's kernels.
        fragmentation: of a GPU's memory, lost between the allocator's blocks.
    """

    gemm: float = 0.6
    expert_gemm: float = 0.35
    attention: float = 0.4
    memory_bandwidth: float = 0.7
    link: float = 0.75
    network: float = 0.8
    host: float = 0.8
    latency: float = 2e-5
    layer: float = 3e-4
    decode_layer: float = 3e-5
    eager_layer: float = 6e-4
    framework: int = 3 * _GIB
    fragmentation: float = 0.04
