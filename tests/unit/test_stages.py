"""How layers are cut into pipeline stages and chunks, and what is said where they can't be."""

from __future__ import annotations

import pytest

from megatron_copsd.architecture import recomputed_layers, stage_layers, stage_problems
from megatron_copsd.config.schema import ParallelSettings


@pytest.mark.parametrize(
    ("layers", "settings", "expected"),
    [
        (28, {"pipeline": 4}, (7, 7, 7, 7)),
        (28, {"pipeline": 4, "first_stage_layers": 4}, (4, 8, 8, 8)),
        (28, {"pipeline": 4, "last_stage_layers": 1}, (9, 9, 9, 1)),
        (94, {"pipeline": 8, "first_stage_layers": 11, "last_stage_layers": 11}, (11, *(12,) * 6, 11)),
        (5, {"pipeline": 2, "first_stage_layers": 3, "last_stage_layers": 2}, (3, 2)),
        (5, {"pipeline": 2, "first_stage_layers": 3}, (3, 2)),
        (6, {"pipeline": 2, "last_stage_layers": 2, "virtual_pipeline": 2}, (4, 2)),
        (5, {}, (5,)),
    ],
)
def test_stage_layers(layers: int, settings: dict, expected: tuple[int, ...]) -> None:
    parallel = ParallelSettings(**settings)
    assert stage_problems(layers, parallel) == []
    assert stage_layers(layers, parallel) == expected


@pytest.mark.parametrize(
    ("layers", "settings", "setting", "rule", "remedy"),
    [
        (28, {"pipeline": 8}, "pipeline", "must divide the model's 28 layers", "Use one of 1, 2, 4, 7, 14, 28, or set"),
        (4, {"pipeline": 8}, "pipeline", "must divide the model's 4 layers", "Use one of 1, 2, 4."),
        (28, {"pipeline": 4, "virtual_pipeline": 2}, "virtual_pipeline", "here 7, 7, 7, 7", "Use one of 1, 7."),
        (
            28,
            {"pipeline": 4, "first_stage_layers": 5},
            "first_stage_layers",
            "leaves 23 of",
            "1, 4, 7, 10, 13, 16, 19,",
        ),
        (28, {"pipeline": 4, "last_stage_layers": 28}, "last_stage_layers", "leaves 0 of", "Use one of 1, 4, 7"),
        (
            5,
            {"pipeline": 2, "first_stage_layers": 3, "last_stage_layers": 3},
            "first_stage_layers",
            "= 3 must",
            "remove",
        ),
        (
            6,
            {"pipeline": 2, "recompute": "full", "recompute_layers": 4},
            "recompute_layers",
            "the 3 layers",
            "Lower it",
        ),
        (2, {"pipeline": 4, "first_stage_layers": 1}, "first_stage_layers", "leaves 1 of", "Lower parallel.pipeline."),
    ],
)
def test_stages_that_do_not_fit(layers: int, settings: dict, setting: str, rule: str, remedy: str) -> None:
    ((name, value, said, advice),) = stage_problems(layers, ParallelSettings(**settings))
    assert name == f"parallel.{setting}"
    assert value == settings[setting]
    assert rule in said
    assert remedy in advice


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pipeline": 2, "last_stage_layers": 4}, (0, 0)),
        ({"pipeline": 2, "last_stage_layers": 4, "recompute": "selective"}, (0, 0)),
        ({"pipeline": 2, "last_stage_layers": 4, "recompute": "full"}, (8, 4)),
        ({"pipeline": 2, "last_stage_layers": 4, "recompute": "full", "recompute_layers": 3}, (3, 3)),
        ({"pipeline": 2, "virtual_pipeline": 3, "recompute": "full", "recompute_layers": 1}, (3, 3)),
    ],
)
def test_layers_that_are_run_again(settings: dict, expected: tuple[int, ...]) -> None:
    parallel = ParallelSettings(**settings)
    assert stage_problems(12, parallel) == []
    assert recomputed_layers(12, parallel) == expected
