"""Megatron's process groups, and this process's place in them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_copsd.config.schema import ParallelSettings


@dataclass(frozen=True)
class Layout:
    """This process's coordinates.

    Attributes:
        settings: how the model is cut.
        tensor_rank, tensor_size: in the tensor-parallel group.
        pipeline_rank, pipeline_size: in the pipeline.
        data_rank, data_size: among the replicas.
        context_rank, context_size: among the ranks that share a replica's sequences.
        tensor_group, pipeline_group, data_group, context_group, expert_group: the process groups.
    """

    settings: ParallelSettings
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    context_rank: int
    context_size: int
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    context_group: dist.ProcessGroup
    expert_group: dist.ProcessGroup

    @property
    def weight_groups(self) -> tuple[dist.ProcessGroup, dist.ProcessGroup, dist.ProcessGroup]:
        """The groups over which weights are gathered whole: tensor, pipeline, expert."""
        return self.tensor_group, self.pipeline_group, self.expert_group

    @property
    def is_last_stage(self) -> bool:
        """True where hidden states of the last layer and the loss live."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def length_multiple(self) -> int:
        """What the length of a microbatch must be a multiple of."""
        return self.tensor_size if self.settings.sequence else 1

    @property
    def microbatch_multiple(self) -> int:
        """What the number of a replica's microbatches must be a multiple of: Megatron interleaves them by rounds."""
        return self.pipeline_size if self.settings.virtual_pipeline > 1 else 1

    @property
    def reports(self) -> bool:
        """True on the processes that speak for their response rows: last stage, first tensor rank."""
        return self.is_last_stage and self.tensor_rank == 0


def initialize(settings: ParallelSettings) -> Layout:
    """Make Megatron's groups over the joined process group.

    The processes of an expert-parallel group are of one stage, and otherwise replicas or tensor-parallel ranks: outside
    the experts they go on as such. An expert is never cut (``expert_tensor_parallel_size=1``): experts are small, and
    spreading more of them costs no reduction.

    Collectives: creates groups; every process of the world must call it.
    """
    needed = settings.pipeline * math.lcm(settings.tensor * settings.context, settings.expert)
    assert dist.get_world_size() % needed == 0, "preflight lets no such run start"
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=settings.tensor,
        pipeline_model_parallel_size=settings.pipeline,
        context_parallel_size=settings.context,
        virtual_pipeline_model_parallel_size=settings.virtual_pipeline if settings.virtual_pipeline > 1 else None,
        expert_model_parallel_size=settings.expert,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=math.ceil(settings.timeout_s / 60),
    )
    if torch.cuda.is_available():
        # Sequence-parallel regions ask for these random states, though nothing here draws from them.
        model_parallel_cuda_manual_seed(0)
    return Layout(
        settings=settings,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=settings.tensor,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=settings.pipeline,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=settings.context,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
        context_group=parallel_state.get_context_parallel_group(),
        expert_group=parallel_state.get_expert_model_parallel_group(),
    )
