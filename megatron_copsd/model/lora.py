"""LoRA (arXiv 2106.09685) beside the frozen linear layers of the transformer blocks.

    y = W x + (alpha / rank) B A x

Each projection of the HF model has matrices A [rank, in] and B [out, rank] of its own, also where Megatron merges
several projections into one layer: an adapter is then the same under every layout, and is PEFT's by another name. The
base model keeps its modules and its parameter names; adapters are submodules that add to a layer's output.

Under tensor parallelism the cut matrix of a pair is cut like W and the other is whole on every rank. Communication
happens between the two, on [T, B, rank]. Under sequence parallelism the whole one meets this rank's positions alone, so
its gradient is a part of a sum, which Megatron completes for parameters that are marked ``sequence_parallel``.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint

from megatron_copsd.architecture import Architecture
from megatron_copsd.config.schema import LoraSettings
from megatron_copsd.hf.names import NameTable
from megatron_copsd.model.parallel import Layout
from megatron_copsd.model.weights import named_parameters_globally
from megatron_copsd.platform import DTYPES

_LINEAR = re.compile(r"decoder\.layers\.\d+\.(self_attention\.linear_(qkv|proj)|mlp\.linear_fc[12])\.weight")
_ADAPTER = ".adapters."


@dataclass(frozen=True)
class Projection:
    """One HF projection within a linear layer of Megatron's.

    Attributes:
        hf: name of the HF module, e.g. ``model.layers.0.self_attn.q_proj``.
        rows: outputs of it on this rank.
        adapted: whether it has an adapter.
    """

    hf: str
    rows: int
    adapted: bool

    @property
    def key(self) -> str:
        """The last part of the name, e.g. ``q_proj``."""
        return self.hf.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Adaptation:
    """What adapters belong to; a checkpoint that holds them alone says so with it.

    Attributes:
        rank, scale, targets: of the settings.
        base: fingerprint of the weights under them.
    """

    rank: int
    scale: float
    targets: list[str]
    base: str


class LinearAdapters(torch.nn.Module):
    """The adapters of one linear layer: A and B of each adapted projection, this rank's shards."""

    def __init__(
        self,
        linear: Any,
        projections: Sequence[Projection],
        groups: int | None,
        settings: LoraSettings,
        layout: Layout,
        seed: int,
    ) -> None:
        """Make the adapters: A uniform in +-1/sqrt(in) as PEFT has it, B zero.

        Args:
            linear: the layer, its weight loaded.
            projections: what it consists of, in the order in which it is merged.
            groups: query groups by which outputs interleave (``linear_qkv``); 1 where projections follow each other;
                None for a layer whose inputs are cut.
            settings: section ``lora``.
            layout: this process's place.
            seed: A is a function of it and of the projection's name.
        """
        super().__init__()
        self.projections, self.scale, self.enabled = tuple(projections), settings.scale, True
        self._groups = groups
        self._sequence_parallel = linear.config.sequence_parallel
        self.a, self.b = torch.nn.ParameterDict(), torch.nn.ParameterDict()
        device, dtype = linear.weight.device, DTYPES.get(settings.dtype or "", linear.weight.dtype)
        inputs = linear.weight.shape[1] * (1 if self.cuts_outputs else layout.tensor_size)
        for projection in filter(lambda each: each.adapted, projections):
            a = _initial_a(f"{seed}/{projection.hf}", settings.rank, inputs)
            if not self.cuts_outputs:
                a = a.chunk(layout.tensor_size, dim=1)[layout.tensor_rank]
            self.a[projection.key] = torch.nn.Parameter(a.to(device=device, dtype=dtype, copy=True))
            self.b[projection.key] = torch.nn.Parameter(
                torch.zeros(projection.rows, settings.rank, device=device, dtype=dtype)
            )
        for matrices, cut, dim in ((self.a, not self.cuts_outputs, 1), (self.b, self.cuts_outputs, 0)):
            for parameter in matrices.values():
                set_tensor_model_parallel_attributes(parameter, cut, dim=dim, stride=1)
                parameter.sequence_parallel = self._sequence_parallel and not cut

    @property
    def cuts_outputs(self) -> bool:
        """True for a column-parallel layer: B is cut and A is whole; False for a row-parallel one: the reverse."""
        return self._groups is not None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return what the adapters add to the layer's output.

        Args:
            inputs: [T, B, in] of a column-parallel layer, this rank's positions under sequence parallelism;
                [T, B, in of this rank] of a row-parallel one.

        Returns:
            [T, B, out of this rank] or [T, B, out], this rank's positions under sequence parallelism.

        Collectives: column-parallel, an all-reduce [T, B, rank] of the gradient, or an all-gather and, of the gradient,
        a reduce-scatter; row-parallel, an all-reduce, or a reduce-scatter and, of the gradient, an all-gather.
        """
        stacked = torch.cat(list(self.a.values()))
        inner = F.linear(inputs.to(stacked.dtype), stacked) * self.scale
        if self._groups is None:
            exchange = (
                reduce_scatter_to_sequence_parallel_region
                if self._sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            (b,) = self.b.values()
            return F.linear(exchange(inner), b)
        exchange = (
            gather_from_sequence_parallel_region if self._sequence_parallel else copy_to_tensor_model_parallel_region
        )
        parts = dict(zip(self.a, exchange(inner).chunk(len(self.a), dim=-1), strict=True))
        return self._merge({key: F.linear(part, self.b[key]) for key, part in parts.items()})

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """Return this rank's shard of W + (alpha / rank) B A, computed in float32 and rounded once.

        Args:
            weight: this rank's shard of W, [out, in].
        """
        products = {key: (self.b[key].detach().float() @ a.detach().float()).t() for key, a in self.a.items()}
        return (weight.float() + self.scale * self._merge(products).t()).to(weight.dtype)

    def _merge(self, outputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Bring outputs of projections, [..., rows] each, into the order of the layer; 0 where there is no adapter."""
        if self._groups is None:
            return next(iter(outputs.values()))
        like = next(iter(outputs.values()))
        parts = [
            outputs[p.key] if p.adapted else like.new_zeros(1).expand(*like.shape[:-1], p.rows)
            for p in self.projections
        ]
        return torch.cat([part.unflatten(-1, (self._groups, -1)) for part in parts], dim=-1).flatten(-2)


def add_adapters(
    model: GPTModel, architecture: Architecture, settings: LoraSettings, layout: Layout, seed: int
) -> None:
    """Freeze the model's parameters and put adapters beside the layers that ``settings.targets`` names.

    At first they add exactly 0. Call it after the weights have been loaded and before Megatron's DDP sees the model.
    """
    model.requires_grad_(False)
    table = NameTable(architecture)
    places = zip(list(model.named_parameters()), list(named_parameters_globally([model])), strict=True)
    for (local_name, weight), (name, _) in places:
        if not _LINEAR.fullmatch(name):
            continue
        rule = table.rule(name)
        groups = {"qkv": architecture.kv_groups // layout.tensor_size, "gated": 1, "row": None}[rule.cut]
        shares = _shares(rule.cut, architecture)
        projections = []
        for hf, share in zip(rule.hf, shares, strict=True):
            module = hf.removesuffix(".weight")
            rows = weight.shape[0] * share // sum(shares)
            projections.append(Projection(module, rows, module.rsplit(".", 1)[-1] in settings.targets))
        if any(projection.adapted for projection in projections):
            linear = model.get_submodule(local_name.removesuffix(".weight"))
            linear.adapters = LinearAdapters(linear, projections, groups, settings, layout, seed)
            linear.register_forward_hook(_add_to_output)
    if model.pre_process and model.config.recompute_granularity is not None:
        # Recomputation passes gradients on only where its input asks for one, and nothing before the layers is trained.
        model.embedding.register_forward_hook(_ask_for_gradient)


def adapters_of(model: torch.nn.Module) -> list[LinearAdapters]:
    """Return the adapters of this process's stage, layer by layer; none where the whole model is trained."""
    return [module for module in model.modules() if isinstance(module, LinearAdapters)]


@contextlib.contextmanager
def switched_off(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Have a stage's chunks be what they were before ``add_adapters``, bit for bit."""
    every = [adapters for chunk in chunks for adapters in adapters_of(chunk)]
    for adapters in every:
        adapters.enabled = False
    try:
        yield
    finally:
        for adapters in every:
            adapters.enabled = True


def effective_weights(chunks: Sequence[GPTModel]) -> dict[str, Callable[[], torch.Tensor]]:
    """Return, by global parameter name, how to get this rank's shard of each of a stage's weights.

    Adapters are merged into the weights that they stand beside, when asked: the model never exists twice.
    """
    weights: dict[str, Callable[[], torch.Tensor]] = {}
    for chunk in chunks:
        modules = dict(chunk.named_modules())
        places = zip(chunk.named_parameters(), named_parameters_globally([chunk]), strict=True)
        for (local_name, _), (name, parameter) in places:
            if _ADAPTER in name:
                continue
            adapters = getattr(modules[local_name.rpartition(".")[0]], "adapters", None)
            if adapters is not None and name.endswith(".weight"):
                weights[name] = partial(adapters.merged, parameter.detach())
            else:
                weights[name] = parameter.detach
    return weights


def sharded_adapters(model: GPTModel) -> dict[str, ShardedTensor]:
    """Describe this process's adapters for a distributed checkpoint, by local parameter name."""
    described = {}
    for (local_name, parameter), (name, _) in zip(
        model.named_parameters(), named_parameters_globally([model]), strict=True
    ):
        if _ADAPTER not in name:
            continue
        if parameter.tensor_model_parallel:
            described[local_name] = make_tp_sharded_tensor_for_checkpoint(parameter, name, parameter.partition_dim)
        else:
            described[local_name] = make_sharded_tensor_for_checkpoint(parameter, name)
    return described


def peft_tensors(chunks: Sequence[GPTModel]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the adapters of a model that this process holds whole, as PEFT names them."""
    for adapters in (each for chunk in chunks for each in adapters_of(chunk)):
        for projection in adapters.projections:
            if projection.adapted:
                yield f"base_model.model.{projection.hf}.lora_A.weight", adapters.a[projection.key].detach()
                yield f"base_model.model.{projection.hf}.lora_B.weight", adapters.b[projection.key].detach()


def _add_to_output(
    linear: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not linear.adapters.enabled:
        return output
    hidden = inputs[0]
    fused_norm = getattr(linear, "layer_norm_weight", None)
    if fused_norm is not None:
        # Transformer Engine's layer normalises its input itself and keeps the result to itself.
        hidden = F.rms_norm(hidden, fused_norm.shape, fused_norm, linear.eps)
    return output[0] + linear.adapters(hidden).to(output[0].dtype), output[1]


def _ask_for_gradient(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output.detach().requires_grad_() if torch.is_grad_enabled() else output


def _initial_a(label: str, rank: int, inputs: int) -> torch.Tensor:
    """Draw the whole of A, [rank, in] float32, so that no layout changes it."""
    seed = int.from_bytes(hashlib.blake2b(f"lora/{label}".encode(), digest_size=7).digest(), "big")
    bound = inputs**-0.5
    return torch.empty(rank, inputs).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))


def _shares(cut: str, architecture: Architecture) -> tuple[int, ...]:
    """How the rows of a merged weight divide among its projections."""
    return {"qkv": (architecture.heads // architecture.kv_groups, 1, 1), "gated": (1, 1), "row": (1,)}[cut]
