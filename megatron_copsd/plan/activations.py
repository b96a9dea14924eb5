"""Bytes that autograd holds of one microbatch between its forward and its backward pass.

Every entry is one tensor that an operation of the layer saves, named after it. The torch implementation on a CPU is
checked against the tensors that a real forward pass saves; Transformer Engine's is read from its sources and not
checked (docs/planner.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_copsd.architecture import Architecture, recomputed_layers, stage_layers
from megatron_copsd.plan.workload import MicrobatchShape, PlanLayout, Workload

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


def layer_bytes(model: Architecture, layout: PlanLayout, work: Workload, shape: MicrobatchShape) -> int:
    """Bytes that the backward pass of one layer needs of its forward pass, nothing recomputed."""
    saved = _torch_layer if work.implementation == "torch" else _transformer_engine_layer
    return saved(model, layout, work, shape) + _rope(model, layout, work, shape)


def stored_bytes(model: Architecture, layout: PlanLayout, work: Workload, shape: MicrobatchShape, stage: int) -> int:
    """Bytes of all layers of a stage that stay until the backward pass of each begins."""
    layers, again = _layers(model, layout, stage)
    each = layer_bytes(model, layout, work, shape)
    if layout.recompute == "selective":  # the feed-forward is run again from its input
        each -= _feed_forward(model, layout, work, layer_tokens(layout, shape))
    return again * _input_bytes(model, layout, work, shape) + (layers - again) * each


def brought_back_bytes(
    model: Architecture, layout: PlanLayout, work: Workload, shape: MicrobatchShape, stage: int
) -> int:
    """Bytes that recomputation brings back, of one layer at a time, on top of all that is stored."""
    if layout.recompute == "selective":
        return _feed_forward(model, layout, work, layer_tokens(layout, shape))
    layers, again = _layers(model, layout, stage)
    # The layers of a chunk that are not run again come last: the backward pass has freed at least one by then.
    whole = layers > 0 and again == layers
    return layer_bytes(model, layout, work, shape) - _input_bytes(model, layout, work, shape) if whole else 0


def _layers(model: Architecture, layout: PlanLayout, stage: int) -> tuple[int, int]:
    """Layers of a stage, and those of them that are run again."""
    stages = stage_layers(model.layers, layout.settings), recomputed_layers(model.layers, layout.settings)
    return stages[0][stage], stages[1][stage]


def _input_bytes(model: Architecture, layout: PlanLayout, work: Workload, shape: MicrobatchShape) -> int:
    """Hidden states between two layers."""
    return layer_tokens(layout, shape).between * model.hidden * work.item


def edge_bytes(model: Architecture, layout: PlanLayout, work: Workload, shape: MicrobatchShape, stage: int) -> int:
    """Bytes of one microbatch that are saved outside the layers: token ids, final norm, places of response rows."""
    tokens = layer_tokens(layout, shape)
    total = tokens.inside * _INT if stage == 0 else 0
    if stage == layout.pipeline - 1:
        rows = -(-shape.rows // layout.context)
        total += tokens.between * _norm(model.hidden, work, shared=False) + 2 * rows * _INT
    return total


def exchanged_bytes(model: Architecture, layout: PlanLayout, work: Workload, shape: MicrobatchShape, stage: int) -> int:
    """Bytes of one microbatch that the schedule keeps besides: what came from the stage before and went to the next.

    In float32 the torch implementation's first norm saves the very tensor that came.
    """
    came = stage > 0 and not (work.dtype == "float32" and work.implementation == "torch")
    went = stage < layout.pipeline - 1
    return (came + went) * _input_bytes(model, layout, work, shape)


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


def _widths(model: Architecture, layout: PlanLayout) -> tuple[int, int, int]:
    """Columns of queries, of keys and of the gated halves on this rank."""
    return (
        model.query_width // layout.tensor,
        model.kv_width // layout.tensor,
        model.ffn // layout.tensor,
    )


def _rope(model: Architecture, layout: PlanLayout, work: Workload, shape: MicrobatchShape) -> int:
    """Cosine and sine, for queries and for keys; every layer makes its own."""
    return 4 * -(-shape.length // layout.context) * model.head_dim * work.item


def _feed_forward(model: Architecture, layout: PlanLayout, work: Workload, tokens: LayerTokens) -> int:
    """What the feed-forward saves inside."""
    if model.experts:
        # Each token goes to so many experts; evenly spread, a rank receives as many copies as it sends.
        copies = model.experts_per_token
        router = model.experts * 2 * _FLOAT + copies * _INT
        return tokens.between * (router + copies * (2 * model.hidden + 3 * model.moe_ffn) * work.item)
    # Both halves of linear_fc1, silu(gate) and the second factor, and their product; fused on a GPU: halves, product.
    tensors = 3 if work.device == "cuda" else 5
    own = tokens.inside * tensors * _widths(model, layout)[2] * work.item
    # Transformer Engine's linear_fc1 has the norm in it and saves what it multiplies.
    return own + (tokens.between * model.hidden * work.item if work.implementation == "transformer_engine" else 0)


def _torch_layer(model: Architecture, layout: PlanLayout, work: Workload, shape: MicrobatchShape) -> int:
    tokens = layer_tokens(layout, shape)
    item, hidden = work.item, model.hidden
    query, kv, _ = _widths(model, layout)
    heads, groups = model.heads // layout.tensor, model.kv_groups // layout.tensor
    between = 2 * _norm(hidden, work, shared=False)
    linear_inputs = 2 * hidden * item
    mixed = (query + 2 * kv) * item  # the product of linear_qkv; keys and values are views of it
    upcast = work.device == "cpu" and work.dtype != "float32"  # norms save copies of their own
    # Regrouping by head copies the queries, unless there is one group or one query each: then they too stay a view.
    query_is_view = groups in (1, heads) and not upcast
    query_norm = heads * _norm(model.head_dim, work, shared=query_is_view)
    key_norm = groups * _norm(model.head_dim, work, shared=not upcast)
    norms = query_norm + key_norm if model.qk_norm else 0
    keeps_mixed = (model.qk_norm and not upcast) or model.heads == model.kv_groups
    # Queries, keys and values as attention takes them, repeated to the number of heads, its output, its statistics.
    values = query if model.heads != model.kv_groups else 0  # with nothing to repeat they stay a view
    attention = (3 * query + values) * item + heads * _FLOAT + (mixed if keeps_mixed else 0)
    if layout.context > 1:  # keys and values of the whole sequence, gathered, and repeated for each of two chunks
        attention += 2 * (kv * layout.context + query * layout.context) * item
    inside = linear_inputs / layout.norm_shards + norms + attention
    return round(tokens.between * between + tokens.inside * inside) + _feed_forward(model, layout, work, tokens)


def _transformer_engine_layer(model: Architecture, layout: PlanLayout, work: Workload, shape: MicrobatchShape) -> int:
    tokens = layer_tokens(layout, shape)
    item, hidden = work.item, model.hidden
    query, kv, _ = _widths(model, layout)
    heads, groups = model.heads // layout.tensor, model.kv_groups // layout.tensor
    # Inputs of both norms, and what linear_qkv multiplies.
    between = 3 * hidden * item + 2 * _FLOAT
    norms = (query + (query + 2 * kv)) * item + (heads + groups) * _FLOAT if model.qk_norm else 2 * kv * item
    # Context-parallel ranks gather the keys and values of the whole sequence.
    attention = (2 * query + 2 * kv * layout.context) * item + heads * _FLOAT
    fed = _feed_forward(model, layout, work, tokens)
    return tokens.between * between + tokens.inside * (norms + attention) + fed
