"""The one place that knows a CPU from a GPU: device, backend, and the mode in which Megatron-Core runs on a CPU.

Megatron-Core names CUDA in its Python (``device="cuda"``, ``torch.cuda.current_device()``), but nothing in the parts
used here needs it. Where there is no GPU, ``start`` therefore answers those names with the CPU, for this process only
and without touching Megatron's files, so that the real schedules, DistributedDataParallel and distributed optimizer
run over Gloo.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megatron_copsd.errors import UserError, describe

# What the settings call a dtype.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Platform:
    """Where this process computes.

    Attributes:
        device: device of parameters and activations.
        backend: torch.distributed backend of the model-parallel groups.
        rank, world_size: of this process in the run.
        node: number of this machine among the run's.
        leads_node: true on one process of each machine.
    """

    device: torch.device
    backend: str
    rank: int
    world_size: int
    node: int = 0
    leads_node: bool = True

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def is_main(self) -> bool:
        """True on the one process that writes logs and files that are written once."""
        return self.rank == 0


def world_size_from_environment() -> int:
    """Return the number of processes the launcher started (1 when started by hand)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(timeout_s: float) -> Platform:
    """Join the process group and make Megatron-Core runnable on whatever device this machine has.

    Args:
        timeout_s: seconds after which a collective that does not complete ends this process.

    Raises:
        UserError: the launcher started more processes on this node than it has GPUs.
    """
    on_gpu = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu:
        if local_rank >= torch.cuda.device_count():
            rule = f"each process needs a GPU of its own and this node has {torch.cuda.device_count()}"
            raise UserError(describe("LOCAL_RANK", local_rank, rule, "Start fewer processes on each node."))
        torch.cuda.set_device(local_rank)
    else:
        _enter_cpu_mode()
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        world_size = world_size_from_environment()
        # A single process needs no rendezvous port; binding one would make two runs on a machine collide.
        store = dist.HashStore() if world_size == 1 else None
        rank = int(os.environ.get("RANK", "0"))
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    rank = dist.get_rank()
    # Launchers that don't count processes by node are taken to have one node.
    node, leads_node = int(os.environ.get("GROUP_RANK", "0")), rank == 0 or os.environ.get("LOCAL_RANK") == "0"
    return Platform(device, dist.get_backend(), rank, dist.get_world_size(), node, leads_node)


def largest(number: int) -> int:
    """Return the largest of the numbers that the processes of the world give.

    Collectives: one of a number; every process must call it.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    everywhere = torch.tensor([number], dtype=torch.int64, device=device)
    dist.all_reduce(everywhere, dist.ReduceOp.MAX)
    return int(everywhere)


def stop() -> None:
    """Leave the process group; safe to call when none was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _quieten_libraries() -> None:
    """Keep other packages' construction chatter off the screen; their errors still show."""
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")
    # Raised inside Megatron's schedules, but attributed to the CPU mode that their calls pass through.
    warnings.filterwarnings("ignore", module=r"megatron_copsd\.platform")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)


@contextlib.contextmanager
def importing_megatron() -> Iterator[None]:
    """Import Megatron without its chatter, and in half the time where there is no GPU.

    Megatron decorates its fused operations with ``torch.compile``, which loads the whole compiler; on a CPU those
    operations are switched off.
    """
    _quieten_libraries()
    # Megatron requires one hardware queue, so that communication is issued in order with computation; CUDA reads this
    # when it starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if torch.cuda.is_available():
        yield
        return
    compiler: Any = torch.compile
    torch.compile = cast(Any, _uncompiled)
    try:
        yield
    finally:
        torch.compile = compiler


def _uncompiled(function: Any = None, **_: object) -> Any:
    """Stands for torch.compile, with or without arguments of its own."""
    return function if function is not None else lambda decorated: decorated


def plain_torch() -> contextlib.AbstractContextManager[None]:
    """Suspend the CPU mode for code that is not Megatron's, whose every torch call it would slow down."""
    return torch._C.DisableTorchFunction()


_CUDA_TYPE_NAMES = {"torch.FloatTensor": "torch.cuda.FloatTensor", "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor"}


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites CUDA devices in torch calls to the CPU and reports CPU tensor types under their CUDA names.

    Page-locked memory, which is there for copies to a GPU, becomes ordinary memory. Norms are summed in float64: torch
    sums them in float32 on CPUs, which for a large gradient is off by up to a thousandth, and by less or more for each
    way of cutting it.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizers compare this string to sort parameters by precision.
            name = func(*args)
            return _CUDA_TYPE_NAMES.get(name, name)
        if func is torch.norm and args[0].dtype is torch.float32 and _is_plain_norm(**kwargs):
            return torch.linalg.vector_norm(args[0], dtype=torch.float64).float()
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.to and any(_names_cuda(a) for a in args[1:2]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


def _is_plain_norm(
    p: object = "fro", dim: object = None, keepdim: bool = False, out: object = None, dtype: object = None
) -> bool:
    """Whether torch.norm is asked for the Euclidean norm of all elements."""
    return p in ("fro", 2, 2.0) and dim is None and not keepdim and out is None and dtype is None


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


class _NullStream:
    """Stands for torch.cuda.Stream where all work is synchronous, and for the events on it."""

    def __init__(self, *_: object, **__: object) -> None:
        self.device = torch.device("cpu")

    def wait_stream(self, _: object) -> None:
        return None

    def wait_event(self, _: object) -> None:
        return None

    def record_event(self, _: object = None) -> _NullStream:
        return self

    def synchronize(self) -> None:
        return None

    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *_: object) -> None:
        return None


@contextlib.contextmanager
def _null_stream_context(_: object = None) -> Iterator[None]:
    yield


# What Megatron asks of CUDA by name, and what answers where there is none.
_ON_A_CPU: tuple[tuple[ModuleType, dict[str, object]], ...] = (
    (
        torch.cuda,
        {
            "current_device": lambda: torch.device("cpu"),
            "set_device": lambda *_: None,
            "synchronize": lambda *_: None,
            "empty_cache": lambda: None,
            "Stream": _NullStream,
            "current_stream": _NullStream,
            "default_stream": _NullStream,
            "stream": _null_stream_context,
        },
    ),
    (torch.cuda.nvtx, {"range_push": lambda *_, **__: None, "range_pop": lambda *_, **__: None}),
)
_cpu_mode: _CudaMeansCpu | None = None


def _enter_cpu_mode() -> None:
    """Answer CUDA's names with the CPU, once for the life of the process."""
    global _cpu_mode
    if _cpu_mode is not None:
        return
    for module, names in _ON_A_CPU:
        for name, stand_in in names.items():
            setattr(module, name, stand_in)
    dist.all_to_all_single = _with_sizes_as_lists(dist.all_to_all_single)
    _replace_rng_tracker()
    _cpu_mode = _CudaMeansCpu()
    _cpu_mode.__enter__()  # type: ignore[no-untyped-call]


def _with_sizes_as_lists(all_to_all_single: Callable[..., object]) -> Callable[..., object]:
    """Let sizes be tensors, which c10d refuses: Megatron makes arrays of them only as it copies them from a GPU."""

    def call(
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_split_sizes: Sequence[int] | torch.Tensor | None = None,
        input_split_sizes: Sequence[int] | torch.Tensor | None = None,
        group: dist.ProcessGroup | None = None,
        async_op: bool = False,
    ) -> object:
        sizes = (output_split_sizes, input_split_sizes)
        lists = (size.tolist() if isinstance(size, torch.Tensor) else size for size in sizes)
        return all_to_all_single(output, tensor, *lists, group=group, async_op=async_op)

    return call


def _replace_rng_tracker() -> None:
    """Give Megatron random states without content: dropout is off and parameters come from files."""
    from megatron.core.tensor_parallel import random as megatron_random

    class CpuRngTracker(megatron_random.CudaRNGStatesTracker):
        def fork(self, name: str = "model-parallel-rng") -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext()

    megatron_random._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    # Activation recompute saves and restores the device's own generator too.
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.empty(0, dtype=torch.uint8)
    megatron_random._set_cuda_rng_state = lambda *_, **__: None
