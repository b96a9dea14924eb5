"""Compiling the Triton kernels for GPUs that are not there, and reading what they need of one.

ptxas and cuobjdump come with Triton. Nothing here may touch a driver, and Triton must not be interpreting.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from copsd_kernels import chunk_rows
from copsd_kernels.streaming import kernels as streaming_kernels
from copsd_kernels.streaming import tiles as streaming_tiles
from copsd_kernels.streaming.tiles import Tiling
from copsd_kernels.triton_entries import KIND_CODES

# Shared memory that one program may have, in bytes, by compute capability.
SHARED_LIMITS = {80: 166_912, 90: 232_448, 100: 232_448}

# How each generation multiplies on its tensor cores, as PTX calls it.
TENSOR_CORE_INSTRUCTIONS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_WARP_SIZE = 32


@dataclass(frozen=True)
class Configuration:
    """One kernel as it is shipped.

    Attributes:
        name: for tables.
        kernel: the function.
        types: Triton type of each argument that is not constant.
        constants: the others.
        warps: of a program.
        options: further ones of the compiler.
        capabilities: compute capabilities that it is made for.
        multiplies: whether it has products that belong on the tensor cores.
    """

    name: str
    kernel: triton.JITFunction
    types: dict[str, str]
    constants: dict[str, int | bool]
    warps: int
    options: dict[str, int] = field(default_factory=dict)
    capabilities: tuple[int, ...] = tuple(SHARED_LIMITS)
    multiplies: bool = False


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes, and what it multiplies with.

    Attributes:
        registers: of each thread.
        stack: bytes of each thread; any means that registers were spilled.
        shared: bytes of shared memory of a program.
        instructions: the tensor-core instructions among ``TENSOR_CORE_INSTRUCTIONS`` that it has.
    """

    registers: int
    stack: int
    shared: int
    instructions: tuple[str, ...]


def configurations() -> Iterator[Configuration]:
    """All configurations that the losses launch: dtypes, divergences, clip, passes, tiles."""
    yield from _row_configurations()
    for dtype, tiling in streaming_tiles.POINTER_TILINGS.items():
        # Newer generations take bfloat16 through descriptors, but for matrices whose rows are not aligned.
        capabilities = (80,) if dtype == torch.bfloat16 else tuple(SHARED_LIMITS)
        for make in (_statistics_configurations, _entries_configurations):
            for configuration in make(dtype, tiling, descriptors=False):
                yield replace(configuration, capabilities=capabilities)
    for (capability, dtype), tiling in streaming_tiles.STATISTICS_TILINGS.items():
        for configuration in _statistics_configurations(dtype, tiling, descriptors=True):
            yield replace(configuration, capabilities=(capability,))
    for (capability, dtype), tiling in streaming_tiles.ENTRIES_TILINGS.items():
        for configuration in _entries_configurations(dtype, tiling, descriptors=True):
            yield replace(configuration, capabilities=(capability,))


def _row_configurations() -> Iterator[Configuration]:
    block = {"BLOCK": chunk_rows.BLOCK}
    types = {
        "logits": "*fp32",
        "parts": "*fp64",
        "row_stride": "i32",
        "columns": "i32",
        "inverse_temperature": "fp32",
    }
    yield Configuration("statistics", chunk_rows.statistics_kernel, types, block, chunk_rows.WARPS)
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
            "first_id": "i32",
            "inverse_temperature": "fp32",
        }
        yield Configuration(f"cross_entropy, {out}", chunk_rows.cross_entropy_kernel, types, block, chunk_rows.WARPS)
    for kind, clip in product(KIND_CODES, (False, True)):
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
        constants = {"KIND": KIND_CODES[kind]} | flags | {"BLOCK": chunk_rows.BLOCK}
        written = " and ".join((["sums"] if sums else []) + ([f"{out} gradient"] if gradient else []))
        name = f"{kind}{', entry clip' if clip else ''}: {written}"
        yield Configuration(name, chunk_rows.divergence_kernel, types, constants, chunk_rows.WARPS)


_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def _stream_configuration(
    name: str,
    kernel: triton.JITFunction,
    dtype: torch.dtype,
    tiling: Tiling,
    descriptors: bool,
    types: dict[str, str],
    flags: dict[str, int | bool],
) -> Configuration:
    element, matrices = _DTYPE_NAMES[dtype], {}
    for matrix in ("student", "teacher", "hidden", "weight", "teacher_weight"):
        block = tiling.columns if "weight" in matrix else tiling.rows
        matrices[matrix] = f"tensordesc<{element}[{block},{tiling.depth}]>" if descriptors else f"*{element}"
    sizes = ("rows", "first", "columns", "depth", "out_stride", "tiles_of_split", "first_id")
    numbers = ("inverse_temperature", "jsd_weight", "entry_clip")
    known = matrices | dict.fromkeys(sizes, "i32") | dict.fromkeys(numbers, "fp32") | types
    blocks = {"BLOCK_ROWS": tiling.rows, "BLOCK_COLUMNS": tiling.columns, "BLOCK_DEPTH": tiling.depth}
    constants = flags | {"DESCRIPTORS": descriptors, "EVEN": True} | blocks
    return Configuration(
        f"streaming {name}: {element}, {'descriptors' if descriptors else 'pointers'}",
        kernel,
        {argument: known[argument] for argument in kernel.arg_names if argument not in constants},
        constants,
        tiling.warps,
        {"num_stages": tiling.stages, "maxnreg": streaming_tiles.MAX_REGISTERS},
        multiplies=dtype == torch.bfloat16,
    )


def _statistics_configurations(dtype: torch.dtype, tiling: Tiling, descriptors: bool) -> Iterator[Configuration]:
    kernel, types = streaming_kernels.statistics_kernel, {"labels": "*i64", "parts": "*fp64"}
    views = {"two views": (2, True, False), "two weights": (2, False, False), "label": (1, True, True)}
    for name, (count, shared, labels) in views.items():
        flags = {"VIEWS": count, "SHARED": shared, "LABELS": labels}
        yield _stream_configuration(f"statistics, {name}", kernel, dtype, tiling, descriptors, types, flags)


def _entries_configurations(dtype: torch.dtype, tiling: Tiling, descriptors: bool) -> Iterator[Configuration]:
    out = {"out": f"*{_DTYPE_NAMES[dtype]}"}
    types = dict.fromkeys(("statistics", "sums", "scale", "total"), "*fp64") | out
    kernel = streaming_kernels.divergence_kernel
    for kind, clip, shared in product(KIND_CODES, (False, True), (True, False)):
        total = kind != "forward_kl" or clip
        # Sums and gradient come in one pass only where the gradient needs no sum.
        for sums, gradient in ((True, False), (not total, True)):
            flags = {"CLIP": clip, "TOTAL": total, "SUMS": sums, "GRADIENT": gradient, "SHARED": shared}
            written = " and ".join((["sums"] if sums else []) + (["gradient"] if gradient else []))
            name = f"{kind}{', entry clip' if clip else ''}{'' if shared else ', two weights'}, {written}"
            constants = {"KIND": KIND_CODES[kind]} | flags
            yield _stream_configuration(name, kernel, dtype, tiling, descriptors, types, constants)
    types = {"statistics": "*fp64", "labels": "*i64", "scale": "*fp64"} | out
    kernel = streaming_kernels.cross_entropy_kernel
    yield _stream_configuration("cross_entropy", kernel, dtype, tiling, descriptors, types, {})


def compile_for(configuration: Configuration, capability: int) -> Resources:
    """Compile for one compute capability (80, 90, 100), with pointers and strides aligned as the trainer's are."""
    names = configuration.kernel.arg_names
    signature = {name: configuration.types.get(name, "constexpr") for name in names}
    aligned = ("row_stride", "student_stride", "teacher_stride", "out_stride", "depth")
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in aligned
    }
    source = ASTSource(
        fn=configuration.kernel, signature=signature, constexprs=configuration.constants, attrs=attributes
    )
    options = {"num_warps": configuration.warps, "enable_fp_fusion": True, **configuration.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, _WARP_SIZE), options=options)
    registers, stack = _registers_and_stack(compiled.asm["cubin"])
    instructions = tuple(name for name in TENSOR_CORE_INSTRUCTIONS.values() if name in compiled.asm["ptx"])
    return Resources(registers, stack, compiled.metadata.shared, instructions)


def _registers_and_stack(cubin: bytes) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(_CUOBJDUMP), "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, f"cuobjdump said nothing of registers: {text}"
    return int(found[1]), int(found[2])
