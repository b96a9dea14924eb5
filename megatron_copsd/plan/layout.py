"""How a model and a step's batch are cut over GPUs, and what can't be cut so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_copsd.config.schema import Config
from megatron_copsd.plan.sizes import ModelSizes, StagePart

Recompute = Literal["none", "selective", "full"]
Implementation = Literal["torch", "transformer_engine"]
Dtype = Literal["float32", "bfloat16"]

ITEM_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class PlanLayout:
    """One way to cut.

    Attributes:
        gpus: processes of the trainer, one a GPU.
        tensor, sequence: tensor-parallel size, and whether norms and residuals are cut over it too.
        pipeline, virtual: pipeline stages, and virtual stages on each.
        first_layers, last_layers: layers of the first and last stage where the split is uneven; None: as the rest.
        context: ranks that share each sequence.
        expert: ranks that share the experts.
        recompute: activations that the backward pass computes again.
        micro_batch: sequences of a microbatch.
        distributed_optimizer: whether optimizer state is sharded over replicas.
    """

    gpus: int
    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual: int = 1
    first_layers: int | None = None
    last_layers: int | None = None
    context: int = 1
    expert: int = 1
    recompute: Recompute = "none"
    micro_batch: int = 1
    distributed_optimizer: bool = True

    @property
    def data(self) -> int:
        """Replicas that see different sequences."""
        return self.gpus // (self.tensor * self.pipeline * self.context)

    @property
    def shards(self) -> int:
        """Ranks over which dense gradients are reduced and optimizer state is sharded."""
        return self.data * self.context

    @property
    def expert_replicas(self) -> int:
        """Ranks with the same experts; experts are not cut over tensor ranks but spread over them."""
        return self.gpus // (self.pipeline * self.expert)

    @property
    def norm_shards(self) -> int:
        """Ranks over which the tokens of norms and residuals are cut, besides context parallelism."""
        return self.tensor if self.sequence else 1

    def stage_layers(self, layers: int) -> tuple[int, ...]:
        """Layers of each stage."""
        free = self.pipeline - (self.first_layers is not None) - (self.last_layers is not None)
        rest = layers - (self.first_layers or 0) - (self.last_layers or 0)
        counts = [rest // free if free else 0] * self.pipeline
        if self.first_layers is not None:
            counts[0] = self.first_layers
        if self.last_layers is not None:
            counts[-1] = self.last_layers
        return tuple(counts)

    def part(self, sizes: ModelSizes, stage: int) -> StagePart:
        """Which part of the model a rank of a stage holds."""
        return StagePart(
            layers=self.stage_layers(sizes.layers)[stage],
            first=stage == 0,
            last=stage == self.pipeline - 1,
            pipeline=self.pipeline,
            tensor=self.tensor,
            expert=self.expert,
        )

    def describe(self) -> str:
        """Return the whole layout in a few words."""
        return f"{self.cuts()}, microbatch {self.micro_batch}, recompute {self.recompute}"

    def cuts(self) -> str:
        """Return how model and batch are cut, sizes of 1 left out."""
        names = {
            "TP": self.tensor,
            "PP": self.pipeline,
            "VPP": self.virtual,
            "CP": self.context,
            "EP": self.expert,
            "DP": self.data,
        }
        words = [f"{name}{size}" for name, size in names.items() if size > 1] or ["one GPU"]
        if self.sequence:
            words[0] = words[0].replace("TP", "TP+SP")
        ends = {"first": self.first_layers, "last": self.last_layers}
        if any(ends.values()):
            words.append(f"({', '.join(f'{name} {count}' for name, count in ends.items() if count)} layers)")
        return " ".join(words)


def layout_problems(sizes: ModelSizes, layout: PlanLayout) -> list[str]:
    """Return every reason why this model can't be cut so; none is a layout that starts."""
    found = []
    ranks = layout.tensor * layout.pipeline * layout.context
    if layout.gpus % ranks:
        found.append(f"TP x PP x CP = {ranks} does not divide {layout.gpus} GPUs")
    ffn = 0 if sizes.experts else sizes.ffn  # experts are never cut
    for what, count in (("heads", sizes.heads), ("key-value groups", sizes.kv_groups), ("ffn columns", ffn)):
        if count % layout.tensor:
            found.append(f"TP {layout.tensor} does not divide {count} {what}")
    if layout.sequence and layout.tensor == 1:
        found.append("sequence parallelism needs TP above 1")
    if layout.sequence is False and layout.tensor > 1 and sizes.experts:
        found.append("experts under TP need sequence parallelism")
    free = layout.pipeline - (layout.first_layers is not None) - (layout.last_layers is not None)
    rest = sizes.layers - (layout.first_layers or 0) - (layout.last_layers or 0)
    if rest < free or (rest % free if free else rest):
        found.append(f"PP {layout.pipeline} does not cut {sizes.layers} layers")
    elif any(count % layout.virtual for count in layout.stage_layers(sizes.layers)):
        found.append(f"VPP {layout.virtual} does not cut the layers of a stage")
    if layout.virtual > 1 and layout.pipeline == 1:
        found.append("virtual stages need PP above 1")
    if layout.expert > 1 and not sizes.experts:
        found.append("a dense model has no experts to spread")
    elif sizes.experts % layout.expert or layout.gpus % (layout.pipeline * layout.expert):
        found.append(f"EP {layout.expert} must divide {sizes.experts} experts and the ranks of a stage")
    return found


def layout_from(config: Config, gpus: int) -> PlanLayout:
    """Read the layout that a configuration asks for."""
    parallel = config.parallel
    return PlanLayout(
        gpus=gpus,
        tensor=parallel.tensor,
        sequence=parallel.sequence,
        pipeline=parallel.pipeline,
        virtual=parallel.virtual_pipeline,
        first_layers=parallel.first_stage_layers,
        last_layers=parallel.last_stage_layers,
        context=parallel.context,
        expert=parallel.expert,
        recompute=parallel.recompute,
        micro_batch=config.optimizer.micro_batch_size,
        distributed_optimizer=config.optimizer.distributed,
    )
