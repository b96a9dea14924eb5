"""Experts: their names in every form, what a configuration may ask of them, and how they may be spread."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from megatron_copsd.config.check import expert_problems
from megatron_copsd.config.schema import Config, ParallelSettings
from megatron_copsd.errors import UserError
from megatron_copsd.hf.names import NameTable
from megatron_copsd.hf.read import architecture_from
from megatron_copsd.hf.released import as_released

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 64,
}
CONFIG = Qwen3MoeConfig(
    **SIZES, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=10, intermediate_size=50, norm_topk_prob=True
)
ARCHITECTURE = architecture_from(CONFIG.to_dict(), "model")


@pytest.mark.parametrize("form", ["local_experts.{e}.linear_{fc}.weight", "linear_{fc}.weight{e}"])
def test_both_forms_of_an_expert_name_the_same_tensors(form: str) -> None:
    table = NameTable(ARCHITECTURE)
    prefix = "decoder.layers.1.mlp.experts."
    up = table.rule(prefix + form.format(e=1, fc="fc1"), first_expert=3)
    expected = tuple(f"model.layers.1.mlp.experts.4.{name}_proj.weight" for name in ("gate", "up"))
    assert (up.hf, up.cut, up.expert) == (expected, "gated", True)
    down = table.rule(prefix + form.format(e=0, fc="fc2"))
    assert (down.hf, down.cut) == (("model.layers.1.mlp.experts.0.down_proj.weight",), "row")


def test_router_is_no_expert() -> None:
    rule = NameTable(ARCHITECTURE).rule("decoder.layers.0.mlp.router.weight", first_expert=3)
    assert rule.hf == ("model.layers.0.mlp.gate.weight",)
    assert not rule.expert


def test_released_names_are_views_of_the_fused_parameters() -> None:
    model = AutoModelForCausalLM.from_config(CONFIG)
    released = as_released(dict(model.named_parameters()))
    assert set(released) == set(NameTable(ARCHITECTURE).hf_names(2))
    released["model.layers.1.mlp.experts.4.up_proj.weight"].fill_(7.0)
    released["model.layers.1.mlp.experts.5.down_proj.weight"].fill_(8.0)
    experts = model.model.layers[1].mlp.experts
    assert (experts.gate_up_proj[4, 10:] == 7.0).all()
    assert not (experts.gate_up_proj[4, :10] == 7.0).any()
    assert (experts.down_proj[5] == 8.0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_sparse_step": 2}, r"decoder_sparse_step: 2: every layer must have experts"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers: \[0\]: every layer must have experts"),
        ({"num_experts_per_tok": 1}, r"num_experts_per_tok: 1: with norm_topk_prob"),
    ],
)
def test_configurations_that_are_another_model(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        architecture_from({**CONFIG.to_dict(), **changes}, "model")


@pytest.mark.parametrize(
    ("sizes", "problems"),
    [
        ({"expert": 3}, []),
        ({"expert": 4}, [("parallel.expert", "Use one of 1, 2, 3, 6.")]),
        # Neither the experts nor the dense size of the configuration, 50, are cut.
        ({"tensor": 4, "sequence": True, "expert": 2}, []),
        ({"tensor": 2}, [("parallel.tensor", "Set parallel.sequence=true, or parallel.tensor=1.")]),
    ],
)
def test_how_experts_can_be_spread(sizes: dict, problems: list) -> None:
    found = ARCHITECTURE.parallel_problems(ParallelSettings(**sizes))
    assert [(setting, remedy) for setting, _, _, remedy in found] == problems


def test_a_dense_model_has_nothing_to_spread() -> None:
    dense = architecture_from(Qwen3Config(**SIZES, intermediate_size=48).to_dict(), "model")
    [(setting, value, rule, _)] = dense.parallel_problems(ParallelSettings(expert=2))
    assert (setting, value) == ("parallel.expert", 2)
    assert "no experts" in rule
    assert dataclasses.replace(dense, experts=2).parallel_problems(ParallelSettings(expert=2)) == []


@pytest.mark.parametrize(
    ("sections", "experts", "message"),
    [
        ({"model": {"path": "m", "moe_aux_loss": 0.1}}, False, ("model.moe_aux_loss", "the model has no experts")),
        ({"model": {"path": "m", "moe_aux_loss": 0.1}}, True, None),
        ({"lora": {"rank": 4}}, False, None),
        ({"lora": {"rank": 4}}, True, ("lora.targets", "gate_proj, up_proj, down_proj belong to experts")),
        ({"lora": {"rank": 4, "targets": ["q_proj", "up_proj"]}}, True, ("lora.targets", "Set [q_proj].")),
        ({"lora": {"rank": 4, "targets": ["q_proj", "o_proj"]}}, True, None),
    ],
)
def test_settings_that_do_not_suit_the_model(sections: dict, experts: bool, message: tuple[str, str] | None) -> None:
    source = {"path": "p.jsonl", "layout": "reference", "language": "SWA"}
    config = Config.model_validate({"model": {"path": "m"}, "data": {"train": [source]}, **sections})
    found = expert_problems(config, experts)
    assert len(found) == (message is not None)
    if message:
        [(setting, _, rule, remedy)] = found
        assert setting == message[0]
        assert message[1] in f"{rule} {remedy}"


def test_released_names_leave_dense_models_alone() -> None:
    weights = {"model.layers.0.mlp.down_proj.weight": torch.ones(2, 2)}
    assert as_released(weights) == weights
