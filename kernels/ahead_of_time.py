"""Compiling the Triton kernels for GPUs that are not there, and reading what they need of one.

ptxas and cuobjdump come with Triton. Nothing here may touch a driver, and Triton must not be interpreting.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from copsd_kernels import row_triton

# Shared memory that one program may have, in bytes, by compute capability.
SHARED_LIMITS = {80: 166_912, 90: 232_448, 100: 232_448}

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_WARP_SIZE = 32


@dataclass(frozen=True)
class Configuration:
    """One kernel as it is shipped.

    Attributes:
        name: for tables.
        kernel: the function.
        types: Triton type of each argument that is not constant, in order.
        constants: the others.
    """

    name: str
    kernel: triton.JITFunction
    types: dict[str, str]
    constants: dict[str, int | bool]


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers and bytes of stack for each thread, bytes of shared memory in all.

    A stack means that registers were spilled.
    """

    registers: int
    stack: int
    shared: int


def configurations() -> Iterator[Configuration]:
    """All configurations that the losses launch: dtypes of the gradient, divergences, clip, passes."""
    block = {"BLOCK": row_triton.BLOCK}
    types = {
        "logits": "*fp32",
        "parts": "*fp64",
        "row_stride": "i32",
        "columns": "i32",
        "inverse_temperature": "fp32",
    }
    yield Configuration("statistics", row_triton.statistics_kernel, types, block)
    for out in ("fp32", "bf16"):
        types = {
            "logits": "*fp32",
            "statistics": "*fp64",
            "labels": "*i64",
            "scale": "*fp64",
            "out": f"*{out}",
            "row_stride": "i32",
            "out_stride": "i32",
            "columns": "i32",
            "first_column": "i32",
            "inverse_temperature": "fp32",
        }
        yield Configuration(f"cross_entropy, {out}", row_triton.cross_entropy_kernel, types, block)
    for kind, clip in product(row_triton.KIND_CODES, (False, True)):
        yield from _divergence_configurations(kind, clip)


def _divergence_configurations(kind: str, clip: bool) -> Iterator[Configuration]:
    total = kind != "forward_kl" or clip
    # Sums and gradient come in one pass only where the gradient needs no sum.
    passes = [(True, False, "fp32"), *((not total, True, out) for out in ("fp32", "bf16"))]
    for sums, gradient, out in passes:
        types = {
            "student": "*fp32",
            "teacher": "*fp32",
            "statistics": "*fp64",
            "sums": "*fp64",
            "out": f"*{out}",
            "scale": "*fp64",
            "total": "*fp64",
            "student_stride": "i32",
            "teacher_stride": "i32",
            "out_stride": "i32",
            "columns": "i32",
            "inverse_temperature": "fp32",
            "jsd_weight": "fp32",
            "entry_clip": "fp32",
        }
        flags = {"CLIP": clip, "TOTAL": total, "SUMS": sums, "GRADIENT": gradient}
        constants = {"KIND": row_triton.KIND_CODES[kind]} | flags | {"BLOCK": row_triton.BLOCK}
        written = " and ".join((["sums"] if sums else []) + ([f"{out} gradient"] if gradient else []))
        name = f"{kind}{', entry clip' if clip else ''}: {written}"
        yield Configuration(name, row_triton.divergence_kernel, types, constants)


def compile_for(configuration: Configuration, capability: int) -> Resources:
    """Compile for one compute capability (80, 90, 100), with pointers and strides aligned as the trainer's are."""
    names = configuration.kernel.arg_names
    signature = {name: configuration.types.get(name, "constexpr") for name in names}
    aligned = ("row_stride", "student_stride", "teacher_stride", "out_stride")
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in aligned
    }
    source = ASTSource(
        fn=configuration.kernel, signature=signature, constexprs=configuration.constants, attrs=attributes
    )
    options = {"num_warps": row_triton.WARPS, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, _WARP_SIZE), options=options)
    registers, stack = _registers_and_stack(compiled.asm["cubin"])
    return Resources(registers, stack, compiled.metadata.shared)


def _registers_and_stack(cubin: bytes) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(_CUOBJDUMP), "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, f"cuobjdump said nothing of registers: {text}"
    return int(found[1]), int(found[2])
