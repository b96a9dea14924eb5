"""What a model is and how it may be cut over processes: the description that reader, trainer and planner share.

Llama-shaped decoders: pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU, in every layer dense or with
routed experts. Plain Python: whoever plans or checks a configuration waits for neither torch nor transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_copsd.config.schema import ParallelSettings
from megatron_copsd.config.settings import Problem

_SHARD_ROWS = 64  # a vocabulary shard has a multiple of so many rows


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by ``factor`` (arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies divided by ``factor``, high ones left alone, a linear passage between (Llama 3.1's config.json).

    Attributes:
        factor: divisor of the low frequencies.
        low_freq_factor, high_freq_factor: how often a frequency turns within ``original_positions`` where it still
            counts as low, and from where on as high.
        original_positions: longest sequence before the context was extended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True)
class Rope:
    """Rotary positions.

    Attributes:
        theta: base of the frequencies.
        scaling: how they are changed for longer contexts; None: not at all.
    """

    theta: float
    scaling: LinearScaling | Llama3Scaling | None = None


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of one decoder.

    Attributes:
        family: which table of ``hf/families`` its config.json is read by.
        layers, hidden, ffn, heads, kv_groups, head_dim, vocab_size, max_positions: sizes; ``vocab_size`` is the
            number of rows of the HF embedding, which may exceed the tokenizer's; ``ffn`` is unused with experts.
        norm_eps: epsilon of every RMSNorm.
        rope: rotary positions.
        tied: whether the output weight is the embedding.
        qkv_bias: whether query, key and value projections have a bias.
        qk_norm: whether queries and keys are normalised per head.
        experts, experts_per_token, moe_ffn: routed experts of every layer, how many a token goes to, and the size of
            each; 0 for a dense model.
        norm_topk_prob: whether the weights of a token's experts are divided by their sum.
    """

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_groups: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope: Rope
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    experts: int = 0
    experts_per_token: int = 0
    moe_ffn: int = 0
    norm_topk_prob: bool = False

    @property
    def query_width(self) -> int:
        """Columns of the queries, and of the attention's output."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of the keys; the values have as many."""
        return self.kv_groups * self.head_dim

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, the vocabulary without padding, a tied embedding once."""
        qkv = self.query_width + 2 * self.kv_width
        attention = self.hidden * (self.query_width + qkv) + (qkv if self.qkv_bias else 0)
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        fed = 3 * self.hidden * self.ffn
        if self.experts:
            fed = self.experts * self.hidden * (3 * self.moe_ffn + 1)  # the router has a column for each
        embeddings = (1 if self.tied else 2) * self.vocab_size * self.hidden
        return self.layers * (attention + norms + fed) + self.hidden + embeddings

    @property
    def active_parameters(self) -> int:
        """Parameters that multiply a token: of the experts, those it is sent to."""
        idle = self.experts - self.experts_per_token
        return self.parameters - self.layers * idle * 3 * self.hidden * self.moe_ffn

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Rows of the embedding once padded so that every shard has a multiple of 64 rows."""
        multiple = _SHARD_ROWS * tensor_parallel
        return -(-self.vocab_size // multiple) * multiple

    def parallel_problems(self, parallel: ParallelSettings) -> list[Problem]:
        """Return every way in which this model can't be cut as asked."""
        problems = self._expert_problems(parallel)
        tensor = parallel.tensor
        for what, count in (("attention heads", self.heads), ("key-value groups", self.kv_groups), ("ffn", self.ffn)):
            if count % tensor and not (what == "ffn" and self.experts):  # experts are never cut
                allowed = [n for n in range(1, self.kv_groups + 1) if self._divides(n)]
                remedy = f"Use one of {', '.join(map(str, allowed))}."
                problems.append(Problem("parallel.tensor", tensor, f"must divide the model's {count} {what}", remedy))
        return problems + stage_problems(self.layers, parallel)

    def _expert_problems(self, parallel: ParallelSettings) -> list[Problem]:
        expert = parallel.expert
        if not self.experts:
            rule = "the model has no experts to spread"
            return [Problem("parallel.expert", expert, rule, "Remove it.")] if expert > 1 else []
        problems: list[Problem] = []
        if self.experts % expert:
            allowed = ", ".join(str(n) for n in range(1, self.experts + 1) if self.experts % n == 0)
            rule = f"must divide the model's {self.experts} experts"
            problems.append(Problem("parallel.expert", expert, rule, f"Use one of {allowed}."))
        if parallel.tensor > 1 and not parallel.sequence:
            # Without it every tensor-parallel rank would route all tokens, and their experts do the work again.
            rule = "Megatron trains experts under tensor parallelism only with sequence parallelism"
            remedy = "Set parallel.sequence=true, or parallel.tensor=1."
            problems.append(Problem("parallel.tensor", parallel.tensor, rule, remedy))
        return problems

    def _divides(self, tensor: int) -> bool:
        ffn = 0 if self.experts else self.ffn
        return not (self.heads % tensor or self.kv_groups % tensor or ffn % tensor)


def process_multiple(parallel: ParallelSettings) -> tuple[int, str]:
    """Return what the number of processes must be a multiple of, and the rule that says so."""
    need = parallel.pipeline * math.lcm(parallel.tensor * parallel.context, parallel.expert)
    replica = "parallel.tensor x parallel.context"
    spread = replica if parallel.expert == 1 else f"(least common multiple of {replica} and parallel.expert)"
    return need, f"must be a multiple of {spread} x parallel.pipeline = {need}"


def stage_layers(layers: int, parallel: ParallelSettings) -> tuple[int, ...]:
    """Return the number of layers of each pipeline stage, for settings without ``stage_problems``.

    A first or last stage of its own size leaves the rest to the other stages in equal shares.
    """
    first, last = parallel.first_stage_layers, parallel.last_stage_layers
    others = parallel.pipeline - (first is not None) - (last is not None)
    share = (layers - (first or 0) - (last or 0)) // others if others else 0
    middle = (share,) * others
    return (*(() if first is None else (first,)), *middle, *(() if last is None else (last,)))


def recomputed_layers(layers: int, parallel: ParallelSettings) -> tuple[int, ...]:
    """Return the number of layers of each pipeline stage that the backward pass runs again from their input."""
    stages = stage_layers(layers, parallel)
    if parallel.recompute != "full":
        return (0,) * len(stages)
    if parallel.recompute_layers is None:
        return stages
    return (parallel.recompute_layers * parallel.virtual_pipeline,) * len(stages)


def stage_problems(layers: int, parallel: ParallelSettings) -> list[Problem]:
    """Return every way in which ``layers`` can't be cut into stages and chunks as asked."""
    sizes: dict[str, int] = {
        name: value
        for name in ("first_stage_layers", "last_stage_layers")
        if (value := getattr(parallel, name)) is not None
    }
    taken, others = sum(sizes.values()), parallel.pipeline - len(sizes)
    left = layers - taken
    if left < others or (others == 0 and left) or (others and left % others):
        return [_uneven(layers, parallel, sizes, left, others) if sizes else _even(layers, parallel)]
    virtual = parallel.virtual_pipeline
    stages = stage_layers(layers, parallel)
    if any(size % virtual for size in stages):
        allowed = [n for n in range(1, min(stages) + 1) if not any(size % n for size in stages)]
        rule = f"must divide the layers of every pipeline stage, here {', '.join(map(str, stages))}"
        return [Problem("parallel.virtual_pipeline", virtual, rule, f"Use one of {', '.join(map(str, allowed))}.")]
    smallest = min(stages) // virtual
    if parallel.recompute_layers is not None and parallel.recompute_layers > smallest:
        rule = f"must not exceed the {smallest} layers of the smallest model chunk"
        remedy = "Lower it, or remove it for all layers."
        return [Problem("parallel.recompute_layers", parallel.recompute_layers, rule, remedy)]
    return []


def _even(layers: int, parallel: ParallelSettings) -> Problem:
    allowed = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
    remedy = f"Use one of {allowed}."
    if parallel.pipeline <= layers:
        remedy = f"Use one of {allowed}, or set parallel.first_stage_layers or parallel.last_stage_layers."
    return Problem("parallel.pipeline", parallel.pipeline, f"must divide the model's {layers} layers", remedy)


def _uneven(layers: int, parallel: ParallelSettings, sizes: dict[str, int], left: int, others: int) -> Problem:
    name, value = next(iter(sizes.items()))
    if others == 0:
        rule = f"with parallel.last_stage_layers = {parallel.last_stage_layers} must make the model's {layers} layers"
        return Problem(f"parallel.{name}", value, rule, "Change one of the two, or remove it.")
    rule = f"leaves {left} of the model's {layers} layers to the other {others} stages, which share them equally"
    rest = sum(sizes.values()) - value
    allowed = [n for n in range(1, layers) if (layers - rest - n) >= others and (layers - rest - n) % others == 0]
    choice = f"Use one of {', '.join(map(str, allowed))}." if allowed else "Lower parallel.pipeline."
    return Problem(f"parallel.{name}", value, rule, choice)
