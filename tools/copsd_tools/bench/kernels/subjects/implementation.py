"""What all comparisons have in common: a subject, the ways of computing it, and what keeps one from a case."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from copsd_tools.bench.kernels.cases import Case, Inputs
from megatron_copsd.errors import UserError
from megatron_copsd.loss.autograd import GradientOptions
from megatron_copsd.loss.implementation import Implementation as FusedImplementation
from megatron_copsd.loss.implementation import choose

_MIB = 1 << 20
_CHUNKED_ROWS = 256


@dataclass(frozen=True)
class FusedOptions:
    """How one of the project's own rows calls a fused loss.

    Attributes:
        implementation: loss.implementation.
        recompute: loss.recompute.
    """

    implementation: FusedImplementation = "auto"
    recompute: bool = False

    @property
    def gradient_options(self) -> GradientOptions:
        """As the loss takes it."""
        return GradientOptions(recompute=self.recompute)


@dataclass(frozen=True)
class Implementation:
    """One way of computing a subject.

    Attributes:
        run: (case, inputs, chunk) to the scalar loss, or to the row values of a subject that is not differentiated;
            ``chunk`` is one of ``chunks``.
        refuses: why it cannot compute a case, or None.
        chunks: rows it takes at a time; of several the fastest is measured. None where it decides that itself.
        compiles: compiles on its first call at a shape.
        extra_units: matrix products [R, H] x [H, V] that it spends above those that none can do without.
        dense_rows: rows whose logits it holds at once, if that is known: R, or its chunk.
        fused: how it calls this project's loss; None of the others.
    """

    run: Callable[[Case, Inputs, int | None], Tensor | tuple[Tensor, ...]]
    refuses: Callable[[Case], str | None]
    chunks: tuple[int | None, ...] = (None,)
    compiles: bool = False
    extra_units: Callable[[Case], int] = lambda case: 0
    dense_rows: Callable[[Case], int | None] = lambda case: None
    fused: FusedOptions | None = None


@dataclass(frozen=True)
class Subject:
    """What is computed: a loss with its gradients, or numbers of each row.

    Attributes:
        views: hidden states whose logits it takes (student and teacher, or one).
        differentiated: whether forward and backward are measured, or forward alone.
        outputs: names of what is compared with the oracle, in the order in which it is returned.
        exact: what all are compared with, by the oracle: (case, inputs in float64 with the whole vocabulary) to what
            ``Implementation.run`` returns.
        implementations: by name.
    """

    views: int
    differentiated: bool
    outputs: tuple[str, ...]
    exact: Callable[[Case, Inputs], Tensor | tuple[Tensor, ...]]
    implementations: Mapping[str, Implementation]

    def floor_units(self, case: Case) -> int:
        """Matrix products [R, H] x [H, V] that none can do without: logits, dX, and dW unless the weight is frozen."""
        return self.views + (0 if not self.differentiated else 1 if case.frozen_weight else 2)


def fused_implementations(
    run: Callable[[FusedOptions, Case, Inputs], Tensor | tuple[Tensor, ...]], *, views: int = 0
) -> dict[str, Implementation]:
    """The project's own rows: one for each value of ``loss.implementation``, and one that recomputes.

    Args:
        run: the loss under these options.
        views: logits that ``loss.recompute`` makes a second time; 0 where nothing is differentiated.
    """
    rows = {
        "fused" if name == "auto" else f"fused_{name}": FusedOptions(name) for name in get_args(FusedImplementation)
    }
    if views:
        rows["fused_recompute"] = FusedOptions(recompute=True)
    return {
        name: Implementation(
            functools.partial(_run_fused, run, options),
            functools.partial(_fused_refuses, options),
            extra_units=functools.partial(fused_extra_units, options, views),
            fused=options,
        )
        for name, options in rows.items()
    }


def dense_implementations(
    dense: Callable[..., Tensor | tuple[Tensor, ...]],
    arguments: Callable[[Case, Inputs], tuple[Any, ...]],
) -> dict[str, Implementation]:
    """All logits at once, as one would write it first, and torch.compile of that.

    Args:
        dense: a plain function of tensors and numbers.
        arguments: what it is called with.
    """

    @functools.cache
    def compiled() -> Callable[..., Tensor | tuple[Tensor, ...]]:
        return torch.compile(dense, dynamic=False)

    all_at_once = Implementation(
        lambda case, inputs, chunk: dense(*arguments(case, inputs)),
        refuses_tensor_parallel,
        dense_rows=lambda case: case.rows,
    )
    return {
        "dense": all_at_once,
        "dense_compiled": replace(
            all_at_once,
            run=lambda case, inputs, chunk: compiled()(*arguments(case, inputs)),
            compiles=True,
        ),
    }


def dense_in_chunks(
    run: Callable[[Case, Inputs, int | None], Tensor | tuple[Tensor, ...]], extra_units: int = 0
) -> Implementation:
    """Dense, so many rows at a time that the logits stay small; arguments as for ``Implementation``."""
    return Implementation(
        run,
        refuses_tensor_parallel,
        chunks=(_CHUNKED_ROWS,),
        extra_units=lambda case: extra_units,
        dense_rows=lambda case: min(_CHUNKED_ROWS, case.rows),
    )


def _run_fused(
    run: Callable[[FusedOptions, Case, Inputs], Tensor | tuple[Tensor, ...]],
    options: FusedOptions,
    case: Case,
    inputs: Inputs,
    chunk: int | None,
) -> Tensor | tuple[Tensor, ...]:
    return run(options, case, inputs)


def fused_extra_units(options: FusedOptions, views: int, case: Case) -> int:
    """Products of making logits more than once; ``views`` as for ``fused_implementations``."""
    if taken(options, case) != "streaming":
        return views if options.recompute else 0
    # It keeps no logits. They are made for the statistics, for a divergence's sums, and for the gradient; the last two
    # at once where the gradient does not depend on the sums. Recomputing begins with a pass that makes no gradient.
    is_divergence = views > 1
    sums_first = is_divergence and case.spec.gradient_needs_sums
    return views * (1 + sums_first + (options.recompute and 1 + is_divergence))


def taken(options: FusedOptions, case: Case) -> Literal["torch", "chunk", "streaming"]:
    """Which way the loss takes; no device is needed.

    Raises:
        UserError: the one that is asked for cannot run there.
    """
    return choose(options.implementation, fake_weight(case), scratch_bytes(case)).implementation


def fake_weight(case: Case) -> Tensor:
    """A weight of the case's shape, dtype and device without memory behind it."""
    with FakeTensorMode():
        return torch.empty(case.local_vocab, case.hidden, dtype=case.torch_dtype, device=case.device)


def _fused_refuses(options: FusedOptions, case: Case) -> str | None:
    try:
        taken(options, case)
    except UserError as error:
        return str(error)
    return None


def scratch_bytes(case: Case) -> int | None:
    """The case's ``loss.scratch_mb`` as the loss takes it."""
    return None if case.scratch_mb is None else int(case.scratch_mb * _MIB)


def vocab_group(case: Case) -> dist.ProcessGroup | None:
    """The ranks that share the vocabulary; None for one."""
    return dist.group.WORLD if case.tensor_parallel > 1 else None


def refuses_tensor_parallel(case: Case) -> str | None:
    """What concerns every implementation but the project's own."""
    return "does not offer tensor_parallel" if case.tensor_parallel > 1 else None


def missing_package(module: str, package: str) -> str | None:
    """Why an implementation of another package cannot run, if that is not installed."""
    if importlib.util.find_spec(module) is None:
        return f"{package} is not installed: pip install 'megatron-copsd[bench]'"
    return None
