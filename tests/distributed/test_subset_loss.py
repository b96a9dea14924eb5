"""SDRRL's sum of subset means, against transformers in float64: however steps are cut, over any epoch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from layouts import LayoutCase, Runs, run_cases, selected
from safetensors.torch import load_file
from subset_oracle import subset_sum
from tiny import make_model, settings, write_config

TOLERANCE = 1e-6
SIZES = {"LL": 12, "TL": 5, "LT": 1, "TT": 9, "mt": 3}  # rows; those of a group are its first variants
GROUPS = 15  # 12 of variants, 3 that stand alone
ALL = (f"rollout.prompts_per_step={GROUPS}", "run.steps=1")
SMALL_STEPS = ("rollout.prompts_per_step=3", "run.steps=5")
PACKED = ("optimizer.packing=true", "optimizer.micro_batch_tokens=200")
CASES = (
    LayoutCase("1 process", 1, ALL),
    LayoutCase("microbatches of 7, packed", 1, (*ALL, "optimizer.micro_batch_size=7", "optimizer.packing=true")),
    LayoutCase("DP2", 2, ALL),
    LayoutCase("DP2, packed by tokens", 2, (*ALL, *PACKED)),
    LayoutCase("TP2 DP2, packed by tokens", 4, (*ALL, *PACKED, "parallel.tensor=2", "parallel.sequence=true")),
    LayoutCase("an epoch of 5 steps", 1, SMALL_STEPS),
    LayoutCase("an epoch of 5 steps, DP4", 4, (*SMALL_STEPS, "optimizer.micro_batch_size=1")),
)


def write_rows(path: Path) -> list[dict[str, object]]:
    rows = [
        {
            "subset": subset,
            "group": f"{subset} {number}" if subset == "mt" else f"variant {number}",
            "target": "SWA",
            "language": "SWA" if subset in ("LT", "TT", "mt") else "EN",
            "problem": f"{subset} {number}: " + "maembe " * (number % 4),
            "solution": f"{number} " * (1 + (3 * number + len(subset)) % 5),
            "verbatim": subset == "mt",
        }
        for subset, size in SIZES.items()
        for number in range(size)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


@pytest.fixture(scope="module")
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Runs, float]:
    folder = tmp_path_factory.mktemp("subsets")
    model = make_model(folder / "model", num_attention_heads=4, num_key_value_heads=2)
    rows = write_rows(folder / "rows.jsonl")
    assert Counter(row["subset"] for row in rows) == SIZES
    source = {"path": str(folder / "rows.jsonl"), "layout": "subsets", "language": "SWA"}
    # So small a rate that the steps of an epoch have the same weights.
    tree = settings(
        folder, model, data={"train": [source]}, objective={"name": "sft"}, loss={"reduction": "subset_mean"},
        optimizer={"lr": 1e-12},
    )  # fmt: skip
    tree["rollout"] = {"max_response_tokens": 40}
    runs = run_cases(selected(request), write_config(folder, tree), load_file(model / "model.safetensors"), folder)
    return runs, subset_sum(model, rows)


@pytest.mark.parametrize("case", [case.parameter for case in CASES])
def test_sum_of_subset_means(tiny: tuple[Runs, float], case: LayoutCase) -> None:
    runs, expected = tiny
    losses = [step["loss"] for step in runs.outcome(case).steps]
    found = sum(losses) / len(losses)
    print(f"| {case.name} | {found:.9f} | {abs(found - expected) / expected:.1e} |")
    assert abs(found - expected) / expected < TOLERANCE
