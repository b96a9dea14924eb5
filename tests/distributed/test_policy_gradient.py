"""GRPO with the ratio to the sampling policy, and sampled-token distillation: the same steps however they are cut."""

from __future__ import annotations

import pytest
from layouts import TOLERANCE, LayoutCase, Runs, compare, difference, norm, run_cases, selected
from safetensors.torch import load_file
from tiny import make_model, settings, write_config

PACKED = ("optimizer.packing=true", "optimizer.micro_batch_tokens=200")
ONE = LayoutCase("1 process", 1)
CASES = (
    LayoutCase("TP2", 2, ("parallel.tensor=2", "parallel.sequence=true")),
    LayoutCase("PP2, packed", 2, ("parallel.pipeline=2", *PACKED)),
    LayoutCase("DP2, packed", 2, PACKED),
)


OBJECTIVES = {
    "grpo": {"policy": {"ratio": "sampled", "clip_low": 0.1, "clip_high": 0.28, "advantage": "centered"}},
    "sampled_token": {"loss": {"temperature": 1.2}},
}


@pytest.fixture(scope="module", params=OBJECTIVES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("grpo")
    model = make_model(folder / "model", num_attention_heads=4, num_key_value_heads=2)
    tree = settings(folder, model, objective={"name": request.param}, **OBJECTIVES[request.param])
    if request.param == "grpo":
        tree["rollout"] = {**tree.get("rollout", {}), "samples_per_prompt": 4}
    return run_cases(
        (ONE, *selected(request)), write_config(folder, tree), load_file(model / "model.safetensors"), folder
    )


@pytest.mark.parametrize("case", [case.parameter for case in CASES])
def test_layouts_agree(tiny: Runs, case: LayoutCase) -> None:
    """The loss, whose advantages cancel within a group, is next to 0 and compared as it is."""
    found, expected = tiny.outcome(case), tiny.outcome(ONE)
    differences = compare(found, expected)
    print(differences.row(case.name))
    assert max(differences.grad_norm, differences.weights) < TOLERANCE
    for one, other in zip(found.steps, expected.steps, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert one.get("importance_ratio", 1) == pytest.approx(1, abs=1e-5)
        assert other["grad_norm"] > 1e-3
    assert difference(expected.weights, tiny.start) > 100 * TOLERANCE * norm(expected.weights)
