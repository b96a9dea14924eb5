"""Training with rollouts from a real server: every transport, layouts, a wrong version, a step ahead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import PUBLIC_DATA, ROOT, metrics, python, train
from sglang_servers import CHECKED
from tiny import make_model

pytestmark = pytest.mark.sglang


@pytest.mark.parametrize(
    ("transport", "processes", "layout", "own"),
    [
        ("disk", 1, ("sglang.verify=logprobs",), False),
        ("distributed", 2, ("parallel.tensor=2", "sglang.verify=checksum"), False),
        ("tensor", 2, ("parallel.pipeline=2", "sglang.verify=logprobs", "sglang.verify_limit=1e-5"), True),
    ],
)
def test_training_through_each_transport(served, config, tmp_path, transport, processes, layout, own):
    """With a server of the run's own, or one that is there."""
    server = () if own else (f"sglang.urls=[{served}]", f"sglang.folder={tmp_path}")
    options = (f"run.dir={tmp_path}", f"sglang.transport={transport}", *layout, *server, *CHECKED)
    train(config, *options, processes=processes)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["agreement/max_difference"] < 1e-4 for line in lines)
    assert all(line["staleness"] == 0 for line in lines)
    rollouts = [json.loads(line) for line in (tmp_path / "rollouts" / "step_000003.jsonl").read_text().splitlines()]
    assert all(rollout["weight_version"] == 2 for rollout in rollouts)


def test_the_wrong_weights_are_noticed(served, config, tmp_path):
    """A server that has other weights than its label says."""
    other = make_model(tmp_path / "other", initializer_range=0.21)
    script = Path(__file__).with_name("wrong_weights.py")
    server = (f"sglang.urls=[{served}]", f"sglang.folder={tmp_path}")
    done = python(script, config, other, f"run.dir={tmp_path / 'run'}", *server, *CHECKED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "noticed: rollout.agreement_limit" in done.stdout


def test_sampling_a_step_ahead(served, config, tmp_path):
    server = (f"sglang.urls=[{served}]", f"sglang.folder={tmp_path}")
    train(config, f"run.dir={tmp_path}", "rollout.ahead=1", "run.steps=4", *server)
    assert [line["staleness"] for line in metrics(tmp_path)] == [0, 1, 1, 1]


def test_grpo_of_responses_a_step_ahead(served, config, tmp_path):
    """The engine's log-probabilities are the trainer's where weights are the same, and of older weights later."""
    server = (f"sglang.urls=[{served}]", f"sglang.folder={tmp_path}", "rollout.ahead=1", "run.steps=4")
    group = ("rollout.samples_per_prompt=4", "rollout.prompts_per_step=6", "optimizer.lr=0.01")
    policy = ("objective.name=grpo", "policy.ratio=sampled", "loss.divergence=forward_kl", *group)
    train(config, f"run.dir={tmp_path}", *policy, *server)
    lines = metrics(tmp_path)
    assert [line["staleness"] for line in lines] == [0, 1, 1, 1]
    assert lines[0]["importance_ratio"] == pytest.approx(1, abs=1e-4)
    assert max(line["grad_norm"] for line in lines) > 0, "no response was worth more than another"
    assert max(abs(line["importance_ratio"] - 1) for line in lines[1:]) > 1e-3


@pytest.mark.slow
@pytest.mark.skipif(not PUBLIC_DATA.is_dir(), reason="needs the MGSM and GSM8K files (COPSD_DATA)")
@pytest.mark.parametrize("transport", ["disk", "distributed", "tensor"])
@pytest.mark.parametrize("tensor", [1, 3])
def test_smollm2_on_mgsm(smollm2, tmp_path, transport, tensor):
    sizes = ("rollout.prompts_per_step=4", "rollout.max_response_tokens=16", "optimizer.micro_batch_size=2")
    engine = ("rollout.engine=sglang", f"sglang.transport={transport}", "sglang.max_total_tokens=8192")
    config = ROOT / "configs" / "smollm2_mgsm_sw.yaml"
    layout = (f"model.path={smollm2}", f"parallel.tensor={tensor}", f"run.dir={tmp_path}", "run.steps=3")
    train(config, *layout, *sizes, *engine, *CHECKED, processes=tensor)
    lines = metrics(tmp_path)
    print(f"\n{transport}, TP = {tensor}: " + ", ".join(f"{line['agreement/max_difference']:.1e}" for line in lines))
    assert len(lines) == 3
