"""How many layers each pipeline stage holds, and what keeps a model from being cut so."""

from __future__ import annotations

from megatron_copsd.config.schema import ParallelSettings

# Setting, value, rule, remedy.
ParallelProblem = tuple[str, object, str, str]


def stage_layers(layers: int, parallel: ParallelSettings) -> tuple[int, ...]:
    """Return the number of layers of each pipeline stage, for settings without ``stage_problems``.

    A first or last stage of its own size leaves the rest to the other stages in equal shares.
    """
    first, last = parallel.first_stage_layers, parallel.last_stage_layers
    others = parallel.pipeline - (first is not None) - (last is not None)
    share = (layers - (first or 0) - (last or 0)) // others if others else 0
    middle = (share,) * others
    return (*(() if first is None else (first,)), *middle, *(() if last is None else (last,)))


def stage_problems(layers: int, parallel: ParallelSettings) -> list[ParallelProblem]:
    """Return (setting, value, rule, remedy) for every way ``layers`` can't be cut into stages and chunks as asked."""
    sizes = {
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
        return [("parallel.virtual_pipeline", virtual, rule, f"Use one of {', '.join(map(str, allowed))}.")]
    smallest = min(stages) // virtual
    if parallel.recompute_layers is not None and parallel.recompute_layers > smallest:
        rule = f"must not exceed the {smallest} layers of the smallest model chunk"
        return [
            ("parallel.recompute_layers", parallel.recompute_layers, rule, "Lower it, or remove it for all layers.")
        ]
    return []


def _even(layers: int, parallel: ParallelSettings) -> ParallelProblem:
    allowed = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
    remedy = f"Use one of {allowed}."
    if parallel.pipeline <= layers:
        remedy = f"Use one of {allowed}, or set parallel.first_stage_layers or parallel.last_stage_layers."
    return "parallel.pipeline", parallel.pipeline, f"must divide the model's {layers} layers", remedy


def _uneven(layers: int, parallel: ParallelSettings, sizes: dict[str, int], left: int, others: int) -> ParallelProblem:
    name, value = next(iter(sizes.items()))
    if others == 0:
        rule = f"with parallel.last_stage_layers = {parallel.last_stage_layers} must make the model's {layers} layers"
        return f"parallel.{name}", value, rule, "Change one of the two, or remove it."
    rule = f"leaves {left} of the model's {layers} layers to the other {others} stages, which share them equally"
    rest = sum(sizes.values()) - value
    allowed = [n for n in range(1, layers) if (layers - rest - n) >= others and (layers - rest - n) % others == 0]
    choice = f"Use one of {', '.join(map(str, allowed))}." if allowed else "Lower parallel.pipeline."
    return f"parallel.{name}", value, rule, choice
