"""Megatron's process groups, and this process's place in them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state


@dataclass(frozen=True)
class Layout:
    """This process's coordinates.

    Attributes:
        tensor_rank, tensor_size: in the tensor-parallel group.
        pipeline_rank, pipeline_size: in the pipeline.
        data_rank, data_size: among the replicas.
        expert_size: over how many processes of a stage the experts are spread.
        tensor_group, pipeline_group, data_group, expert_group: the process groups.
    """

    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    expert_size: int
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    expert_group: dist.ProcessGroup

    @property
    def is_last_stage(self) -> bool:
        """True where hidden states of the last layer and the loss live."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def reports(self) -> bool:
        """True on the one process of each replica that speaks for it: last stage, first tensor rank."""
        return self.is_last_stage and self.tensor_rank == 0


def initialize(tensor: int, pipeline: int, timeout_s: float, expert: int = 1) -> Layout:
    """Make Megatron's groups over the joined process group.

    The processes of an expert-parallel group are of one stage, and otherwise replicas or tensor-parallel ranks: outside
    the experts they go on as such. An expert is never cut (``expert_tensor_parallel_size=1``): experts are small, and
    spreading more of them costs no reduction.

    Collectives: creates groups; every process of the world must call it.
    """
    needed = pipeline * math.lcm(tensor, expert)
    assert dist.get_world_size() % needed == 0, "preflight lets no such run start"
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
    )
    return Layout(
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=tensor,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=pipeline,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        expert_size=expert,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
        expert_group=parallel_state.get_expert_model_parallel_group(),
    )
