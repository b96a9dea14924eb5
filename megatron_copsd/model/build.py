"""Building the Megatron-Core model of an architecture.

Megatron-Core is moving from GPTModel to a hybrid model; this file and ``layers.py`` are the only ones that know which.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_copsd.architecture import Architecture, LinearScaling, Rope
from megatron_copsd.config.schema import ModelSettings
from megatron_copsd.hf.names import NameTable
from megatron_copsd.model.layers import block_spec, use_transformer_engine
from megatron_copsd.model.lora import Adaptation
from megatron_copsd.model.parallel import Layout
from megatron_copsd.model.weights import named_parameters_globally
from megatron_copsd.platform import DTYPES
from megatron_copsd.types import VocabShard


class HiddenStatesModel(GPTModel):
    """A GPTModel whose last stage returns final hidden states [T, B, H] and never computes logits.

    The output weight stays a parameter of the model; the loss takes it and the response rows of the hidden states.
    """

    def _postprocess(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        # The rest of the arguments serve logits, labels and multi-token prediction, and differ between versions.
        if self.post_process and self.config.sequence_parallel:
            # The loss hands back each vocabulary shard's part of the gradient, so that one reduce-scatter both adds
            # the parts up and cuts the sum by position.
            return gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True)
        return hidden_states

    @property
    def output_weight(self) -> torch.nn.Parameter:
        """This rank's shard of the output weight, [V_local, H]; only on the last stage."""
        assert self.post_process
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


@dataclass(frozen=True)
class LocalModel:
    """What this process holds of a model.

    Attributes:
        architecture: of the whole model.
        layout: this process's place.
        chunks: its stage and shard, one chunk of layers or several, from input to output.
        adaptation: what the model's adapters belong to; None where the whole model is trained.
    """

    architecture: Architecture
    layout: Layout
    chunks: tuple[HiddenStatesModel, ...]
    adaptation: Adaptation | None = None

    @property
    def shard(self) -> VocabShard:
        """Vocabulary entries of this rank's shard of the output weight."""
        rows = self.architecture.padded_vocab(self.layout.tensor_size) // self.layout.tensor_size
        return VocabShard(self.layout.tensor_rank * rows, rows, self.architecture.vocab_size)

    @property
    def output_weight(self) -> torch.nn.Parameter:
        """This rank's shard of the output weight, [V_local, H]; only on the last stage."""
        return self.chunks[-1].output_weight


def transformer_config(
    architecture: Architecture, settings: ModelSettings, layout: Layout, on_gpu: bool, transformer_engine: bool
) -> TransformerConfig:
    """Return Megatron's configuration of an architecture under a layout."""
    dtype = DTYPES[settings.dtype]
    parallel = layout.settings
    interleaved, full_recompute = parallel.virtual_pipeline > 1, parallel.recompute == "full"
    return TransformerConfig(
        num_layers=architecture.layers,
        hidden_size=architecture.hidden,
        ffn_hidden_size=architecture.ffn,
        num_attention_heads=architecture.heads,
        num_query_groups=architecture.kv_groups,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype,
        transformer_impl="transformer_engine" if transformer_engine else "local",
        tensor_model_parallel_size=layout.tensor_size,
        pipeline_model_parallel_size=layout.pipeline_size,
        context_parallel_size=layout.context_size,
        cp_comm_type="p2p",  # Transformer Engine's ring; the torch implementation all-gathers
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        # With two stages the next is the one before: only separate messages keep the two directions apart.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        sequence_parallel=parallel.sequence,
        recompute_granularity=None if parallel.recompute == "none" else parallel.recompute,
        # Megatron's words for the first n layers of a chunk, and for each layer by itself.
        recompute_method=("block" if parallel.recompute_layers else "uniform") if full_recompute else None,
        recompute_num_layers=(parallel.recompute_layers or 1) if full_recompute else None,
        # The attention of either implementation keeps no [T, T] matrix; the feed-forward holds most of the rest.
        recompute_modules=["moe" if architecture.experts else "mlp"],
        # Microbatches are padded to their own longest sequence, so stages announce shapes to each other.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the only one that variable lengths admit, checked for dense models too
        num_moe_experts=architecture.experts or None,
        moe_router_topk=architecture.experts_per_token,
        moe_ffn_hidden_size=architecture.moe_ffn or None,
        expert_model_parallel_size=layout.settings.expert,
        expert_tensor_parallel_size=1,
        # A softmax over the chosen experts alone is that over all of them, renormalised.
        moe_router_pre_softmax=not architecture.norm_topk_prob,
        moe_router_dtype="fp32",
        moe_aux_loss_coeff=settings.moe_aux_loss,
        moe_grouped_gemm=bool(architecture.experts) and transformer_engine,
        # Losses arrive divided by the global token count already; gradients are summed and not divided again.
        calculate_per_token_loss=True,
        # Every parameter is read from the HF weights after construction.
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=on_gpu,
        # Without it Megatron cuts packed sequences apart on the host, layer by layer.
        apply_rope_fusion=transformer_engine,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


def build_model(
    architecture: Architecture, settings: ModelSettings, layout: Layout, device: torch.device
) -> tuple[HiddenStatesModel, ...]:
    """Build this process's stage and shard of the model; its parameters hold no weights yet.

    Returns:
        The stage's chunks of layers, from input to output: one, or ``parallel.virtual_pipeline`` of them.

    Raises:
        UserError: ``model.implementation`` asks for Transformer Engine and it cannot be used here.
    """
    transformer_engine = use_transformer_engine(settings.implementation, device, DTYPES[settings.dtype])
    config = transformer_config(architecture, settings, layout, device.type == "cuda", transformer_engine)
    last = layout.settings.virtual_pipeline - 1
    return tuple(
        _build_chunk(
            architecture,
            config,
            block_spec(config, transformer_engine, chunk),
            layout,
            chunk,
            is_first=chunk == 0 and layout.pipeline_rank == 0,
            is_last=chunk == last and layout.is_last_stage,
        ).to(device=device, dtype=config.params_dtype)
        for chunk in range(last + 1)
    )


def _build_chunk(
    architecture: Architecture,
    config: TransformerConfig,
    spec: TransformerBlockSubmodules,
    layout: Layout,
    chunk: int,
    *,
    is_first: bool,
    is_last: bool,
) -> HiddenStatesModel:
    model = HiddenStatesModel(
        config,
        spec,
        vocab_size=architecture.padded_vocab(layout.tensor_size),
        max_sequence_length=architecture.max_positions,
        pre_process=is_first,
        post_process=is_last,
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type="rope",
        vp_stage=chunk,
    )
    _mark_shards(model, architecture)
    # Megatron computes the unscaled frequencies, or scales them by fixed numbers.
    model.rotary_pos_emb.inv_freq = inverse_frequencies(architecture.rope, architecture.head_dim)
    return model


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Return the angles by which rotary positions turn from one token to the next, [head_dim / 2] float32 on the CPU.

    Operation by operation as transformers computes them: engines must use the same bits.
    """
    plain = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim)
    scaling = rope.scaling
    if scaling is None:
        return plain
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_positions
    wavelength = 2 * math.pi / plain  # tokens of a full turn
    slow, fast = wavelength > original / low, wavelength < original / high
    scaled = torch.where(slow, plain / scaling.factor, plain)
    blend = (original / wavelength - low) / (high - low)
    between = (1 - blend) * scaled / scaling.factor + blend * scaled
    return torch.where(slow | fast, scaled, between)


def _mark_shards(model: HiddenStatesModel, architecture: Architecture) -> None:
    """Say which parameters are cut over tensor-parallel ranks, and which are experts'.

    Megatron 0.16 marks the former while it initialises them, which is switched off; its gradient norm counts an
    unmarked parameter on the first rank alone. It takes experts for replicated over data-parallel ranks alone where
    they are not spread, although each tensor-parallel rank then has a copy that sees its own tokens.
    """
    table = NameTable(architecture)
    parameter: Any  # Megatron reads marks off attributes of its parameters
    for name, parameter in named_parameters_globally([model]):
        parameter.allreduce = not table.rule(name).expert
        if hasattr(parameter, "tensor_model_parallel"):
            continue  # newer versions mark them in any case
        cut = table.rule(name).cut
        set_tensor_model_parallel_attributes(parameter, cut != "replicated", dim=1 if cut == "row" else 0, stride=1)


def wrap_for_training(
    chunks: Sequence[HiddenStatesModel], distributed_optimizer: bool, overlap: bool
) -> tuple[DistributedDataParallel, ...]:
    """Put each chunk behind Megatron's DDP: contiguous fp32 gradient buffers, summed over replicas.

    With ``overlap`` the sums are begun in the backward pass of the last microbatch, bucket by bucket. Parameters are
    always gathered at once after the update: the weight sync and the teacher read them before the next forward pass.

    Collectives: broadcasts parameters within each data-parallel group.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        use_distributed_optimizer=distributed_optimizer,
    )
    wrapped = tuple(DistributedDataParallel(config=chunk.config, ddp_config=config, module=chunk) for chunk in chunks)
    if overlap:
        # The schedule holds the sums back until the last microbatch. Interleaved schedules take a list.
        held_back = [chunk.no_sync for chunk in wrapped]
        chunks[0].config.no_sync_func = held_back if len(held_back) > 1 else held_back[0]
    return wrapped
