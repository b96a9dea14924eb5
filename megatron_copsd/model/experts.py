"""Routed experts: the router with its load-balancing loss."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec

# Without Transformer Engine, version 0.16 leaves this name undefined and asks for it all the same.
vars(moe_utils).setdefault("te_general_gemm", None)


class BalancedRouter(TopKRouter):
    """Megatron's router, whose load-balancing loss is a mean over the positions of the whole step.

    For each layer and microbatch of n positions out of the step's N (padding left out),

        L = model.moe_aux_loss * n / N * E * sum over experts e of f_e * P_e

    with f_e the share of the microbatch's choices that fell on e, and P_e its mean router probability (Switch
    Transformer, arXiv 2101.03961, equations 4 to 6); 1 times the coefficient where experts are chosen evenly. Each
    microbatch is balanced by itself, so the loss depends on what is in it, but its weight does not. Megatron's own
    scaling expects gradients to be divided by a token count afterwards, which they are not here.
    """

    step_positions: int = 0

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts; logits [T of this rank, B, E], padding_mask [T, B], true where it is padding."""
        if padding_mask is not None and len(padding_mask) != len(logits):
            # Megatron cuts the mask by position on the first pipeline stage alone.
            padding_mask = padding_mask.chunk(self.tp_group.size())[self.tp_group.rank()]
        return super().routing(logits, padding_mask)

    def _apply_aux_loss(
        self,
        probs: torch.Tensor,
        scores_for_aux_loss: torch.Tensor,
        routing_map: torch.Tensor,
        with_padding_mask: bool = False,
    ) -> torch.Tensor:
        """Attach the loss to ``probs``; scores and map are [positions of this rank, E], zero where it is padding."""
        assert self.step_positions, "the step's positions must be announced"
        choices = routing_map.sum(dim=0)
        dist.all_reduce(choices, group=self.tp_cp_group)
        # n * f_e * P_e, of which this rank adds its own positions' part of P_e.
        balance = (choices / choices.sum().clamp(min=1) * scores_for_aux_loss.sum(dim=0)).sum()
        coefficient = self.config.moe_aux_loss_coeff * self.config.num_moe_experts / self.step_positions
        return moe_utils.MoEAuxLossAutoScaler.apply(probs, coefficient * balance)


def announce_positions(chunks: Sequence[torch.nn.Module], positions: int) -> None:
    """Tell a stage's routers how many positions the step has, over all microbatches and replicas."""
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, BalancedRouter):
            module.step_positions = positions


def with_balanced_router(layer: ModuleSpec) -> None:
    """Put the router into the spec of a layer with experts."""
    mlp = layer.submodules.mlp
    submodules = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
    submodules.router = BalancedRouter
