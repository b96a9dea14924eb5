"""Bytes that autograd holds of one microbatch between its forward and its backward pass.

Every entry is one tensor that an operation of the layer saves, named after it. The torch implementation on a CPU is
checked against the tensors that a real forward pass saves; Transformer Engine's is read from its sources and not
checked (docs/planner.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_copsd.plan.layout import PlanLayout
from megatron_copsd.plan.sizes import ModelSizes
from megatron_copsd.plan.workload import MicrobatchShape, Workload

_FLOAT = 4
_INT = 8


@dataclass(frozen=True)
class LayerTokens:
    """Tokens of a microbatch that one rank holds inside a layer, and between the cuts of sequence parallelism."""

    inside: int
    between: int


def layer_tokens(layout: PlanLayout, shape: MicrobatchShape) -> LayerTokens:
    """Cut a microbatch over context-parallel, and norms and residuals over tensor-parallel ranks."""
    length = -(-shape.length // layout.context)
    return LayerTokens(shape.sequences * length, shape.sequences * -(-length // layout.norm_shards))


def layer_bytes(sizes: ModelSizes, layout: PlanLayout, work: Workload, shape: MicrobatchShape) -> int:
    """Bytes that the backward pass of one layer needs of its forward pass, nothing recomputed."""
    saved = _torch_layer if work.implementation == "torch" else _transformer_engine_layer
    return saved(sizes, layout, work, shape) + _rope(sizes, layout, work, shape)


def stored_layer_bytes(sizes: ModelSizes, layout: PlanLayout, work: Workload, shape: MicrobatchShape) -> int:
    """Bytes of one layer that stay until its backward pass begins."""
    tokens = layer_tokens(layout, shape)
    if layout.recompute == "full":
        return tokens.between * sizes.hidden * work.item
    whole = layer_bytes(sizes, layout, work, shape)
    # Selective: the feed-forward is run again from its input.
    return whole - (_feed_forward(sizes, layout, work, tokens) if layout.recompute == "selective" else 0)


def edge_bytes(sizes: ModelSizes, layout: PlanLayout, work: Workload, shape: MicrobatchShape, stage: int) -> int:
    """Bytes of one microbatch that are saved outside the layers: token ids, final norm, places of response rows."""
    tokens = layer_tokens(layout, shape)
    total = tokens.inside * _INT if stage == 0 else 0
    if stage == layout.pipeline - 1:
        rows = -(-shape.rows // layout.context)
        total += tokens.between * _norm(sizes.hidden, work, shared=False) + 2 * rows * _INT
    return total


def exchanged_bytes(sizes: ModelSizes, layout: PlanLayout, work: Workload, shape: MicrobatchShape, stage: int) -> int:
    """Bytes of one microbatch that the schedule keeps besides: what came from the stage before and went to the next.

    In float32 the torch implementation's first norm saves the very tensor that came.
    """
    came = stage > 0 and not (work.dtype == "float32" and work.implementation == "torch")
    went = stage < layout.pipeline - 1
    return (came + went) * layer_tokens(layout, shape).between * sizes.hidden * work.item


def _norm(width: int, work: Workload, *, shared: bool) -> int:
    """Bytes a token of one RMSNorm: its input, the inverse root mean square, and on a CPU the normalised input.

    Args:
        width: features.
        work: dtype and device.
        shared: whether another operation saves the input too; a CPU in bfloat16 saves an upcast copy all the same.
    """
    if work.device == "cpu":
        return (0 if shared and work.dtype == "float32" else _FLOAT * width) + _FLOAT + _FLOAT * width
    return (0 if shared else work.item * width) + _FLOAT


def _widths(sizes: ModelSizes, layout: PlanLayout) -> tuple[int, int, int]:
    """Columns of queries, of keys and of the gated halves on this rank."""
    return (
        sizes.query_width // layout.tensor,
        sizes.kv_width // layout.tensor,
        sizes.ffn // layout.tensor,
    )


def _rope(sizes: ModelSizes, layout: PlanLayout, work: Workload, shape: MicrobatchShape) -> int:
    """Cosine and sine, for queries and for keys; every layer makes its own."""
    return 4 * -(-shape.length // layout.context) * sizes.head_dim * work.item


def _feed_forward(sizes: ModelSizes, layout: PlanLayout, work: Workload, tokens: LayerTokens) -> int:
    """What the feed-forward saves inside."""
    if sizes.experts:
        # Each token goes to so many experts; evenly spread, a rank receives as many copies as it sends.
        copies = sizes.experts_per_token
        router = sizes.experts * 2 * _FLOAT + copies * _INT
        return tokens.between * (router + copies * (2 * sizes.hidden + 3 * sizes.expert_ffn) * work.item)
    # Both halves of linear_fc1, silu(gate) and the second factor, and their product; fused on a GPU: halves, product.
    tensors = 3 if work.device == "cuda" else 5
    own = tokens.inside * tensors * _widths(sizes, layout)[2] * work.item
    # Transformer Engine's linear_fc1 has the norm in it and saves what it multiplies.
    return own + (tokens.between * sizes.hidden * work.item if work.implementation == "transformer_engine" else 0)


def _torch_layer(sizes: ModelSizes, layout: PlanLayout, work: Workload, shape: MicrobatchShape) -> int:
    tokens = layer_tokens(layout, shape)
    item, hidden = work.item, sizes.hidden
    query, kv, _ = _widths(sizes, layout)
    heads, groups = sizes.heads // layout.tensor, sizes.kv_groups // layout.tensor
    between = 2 * _norm(hidden, work, shared=False)
    linear_inputs = 2 * hidden * item
    mixed = (query + 2 * kv) * item  # the product of linear_qkv; keys and values are views of it
    upcast = work.device == "cpu" and work.dtype != "float32"  # norms save copies of their own
    # Regrouping by head copies the queries, unless there is one group or one query each: then they too stay a view.
    query_is_view = groups in (1, heads) and not upcast
    query_norm = heads * _norm(sizes.head_dim, work, shared=query_is_view)
    key_norm = groups * _norm(sizes.head_dim, work, shared=not upcast)
    norms = query_norm + key_norm if sizes.qk_norm else 0
    keeps_mixed = (sizes.qk_norm and not upcast) or sizes.heads == sizes.kv_groups
    # Queries, keys and values as attention takes them, repeated to the number of heads, its output, its statistics.
    values = query if sizes.heads != sizes.kv_groups else 0  # with nothing to repeat they stay a view
    attention = (3 * query + values) * item + heads * _FLOAT + (mixed if keeps_mixed else 0)
    if layout.context > 1:  # keys and values of the whole sequence, gathered, and repeated for each of two chunks
        attention += 2 * (kv * layout.context + query * layout.context) * item
    inside = linear_inputs / layout.norm_shards + norms + attention
    return round(tokens.between * between + tokens.inside * inside) + _feed_forward(sizes, layout, work, tokens)


def _transformer_engine_layer(sizes: ModelSizes, layout: PlanLayout, work: Workload, shape: MicrobatchShape) -> int:
    tokens = layer_tokens(layout, shape)
    item, hidden = work.item, sizes.hidden
    query, kv, _ = _widths(sizes, layout)
    heads, groups = sizes.heads // layout.tensor, sizes.kv_groups // layout.tensor
    # Inputs of both norms, and what linear_qkv multiplies.
    between = 3 * hidden * item + 2 * _FLOAT
    norms = (query + (query + 2 * kv)) * item + (heads + groups) * _FLOAT if sizes.qk_norm else 2 * kv * item
    # Context-parallel ranks gather the keys and values of the whole sequence.
    attention = (2 * query + 2 * kv * layout.context) * item + heads * _FLOAT
    fed = _feed_forward(sizes, layout, work, tokens)
    return tokens.between * between + tokens.inside * (norms + attention) + fed
