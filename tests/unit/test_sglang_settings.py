"""Settings of the rollout servers: what is refused before anything starts, and the command lines they become."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from tiny import make_model, settings, write_config

from copsd_tools.bench.servers.sync_command import TRANSPORTS
from megatron_copsd.config.check import check
from megatron_copsd.config.load import load_config
from megatron_copsd.config.schema import SglangSettings
from megatron_copsd.engines import build_verifier
from megatron_copsd.errors import UserError
from megatron_copsd.hf.read import read_architecture
from megatron_copsd.rollout.sglang.process import plan_servers, server_command, server_environment


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    return write_config(folder, settings(folder, make_model(folder / "model")))


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        (["rollout.ahead=1"], "rollout.ahead"),
        (["rollout.engine=sglang", "sglang.devices=[0,1,2]"], "sglang.devices"),
        (["rollout.engine=sglang", "sglang.tensor=2"], "sglang.tensor"),
        (["rollout.engine=sglang", "sglang.urls=[localhost:3000]"], "sglang.urls"),
        (["rollout.engine=sglang", "sglang.urls=[http://h:1]", "sglang.transport=tensor"], "sglang.transport"),
        (["rollout.engine=sglang", "sglang.release_memory=true"], "sglang.release_memory"),
        (
            [
                "rollout.engine=sglang",
                "sglang.devices=[0]",
                "sglang.release_memory=true",
                "sglang.transport=distributed",
            ],
            "sglang.transport",
        ),
        (
            ["rollout.engine=sglang", "rollout.ahead=1", "sglang.devices=[0]", "sglang.release_memory=true"],
            "sglang.release_memory",
        ),
        (["rollout.engine=sglang", "sglang.pause=retract"], "sglang.pause"),
        (
            ["rollout.engine=sglang", "rollout.ahead=1", "sglang.pause=in_place", "sglang.verify=logprobs"],
            "sglang.verify",
        ),
    ],
)
def test_impossible_settings_are_refused(config, overrides, setting):
    with pytest.raises(UserError, match=setting.replace(".", r"\.")):
        check(load_config(str(config), overrides))


def test_benchmark_offers_every_transport():
    """Its help imports nothing heavy, and so has a list of its own."""
    assert get_args(SglangSettings.model_fields["transport"].annotation) == TRANSPORTS


def test_a_missing_environment_names_its_remedy(config):
    with pytest.raises(UserError, match="make sglang"):
        plan_servers(load_config(str(config), ["sglang.python=/nowhere/python"]).config)


def test_a_machine_with_gpus_does_not_serve_on_its_cpu_unasked(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"sglang\.devices"):
        plan_servers(load_config(str(config)).config)


def test_servers_share_the_devices_out(config, tmp_path):
    python = tmp_path / "python"
    python.touch()
    overrides = [f"sglang.python={python}", "sglang.servers=2", "sglang.tensor=2", "sglang.devices=[4,5,6,7]"]
    plans = plan_servers(load_config(str(config), [*overrides, "sglang.port=3000"]).config)
    assert [plan.devices for plan in plans] == [(4, 5), (6, 7)]
    assert [plan.port for plan in plans] == [3000, 3001]
    command = server_command(plans[1], 3001)
    assert command[command.index("--tp-size") + 1] == "2"
    assert "--device" not in command


def test_a_server_sees_the_devices_that_the_trainer_means(config, tmp_path):
    python = tmp_path / "python"
    python.touch()
    overrides = [f"sglang.python={python}", "sglang.devices=[1]", "sglang.release_memory=true"]
    (plan,) = plan_servers(load_config(str(config), overrides).config)
    ours = {"RANK": "3", "HOME": "/home", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    ours["PYTHONDONTWRITEBYTECODE"] = "1"
    theirs = server_environment(plan, ours)
    assert theirs == {"HOME": "/home", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "1"}
    assert server_environment(plan, ours | {"CUDA_VISIBLE_DEVICES": "4,5"})["CUDA_VISIBLE_DEVICES"] == "5"
    with pytest.raises(UserError, match=r"sglang\.devices.*CUDA_VISIBLE_DEVICES=7"):
        server_environment(plan, ours | {"CUDA_VISIBLE_DEVICES": "7"})


def test_experts_have_no_checksums(tmp_path):
    model = make_model(tmp_path / "model", "qwen3_moe")
    path = write_config(tmp_path, settings(tmp_path, model))
    architecture = read_architecture(str(model), None)
    with pytest.raises(UserError, match=r"sglang\.verify: 'checksum'.*Set logprobs"):
        build_verifier(load_config(str(path), ["sglang.verify=checksum"]).config, architecture, "cpu")
    assert build_verifier(load_config(str(path), ["sglang.verify=logprobs"]).config, architecture, "cpu").limit == 0.1


def test_each_node_has_an_address_and_logs_of_its_own(config, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.touch()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    loaded = load_config(str(config), [f"sglang.python={python}", "sglang.host=auto", "sglang.servers=2"]).config
    plans = plan_servers(loaded, node=3)
    assert [plan.host for plan in plans] == ["127.0.0.1"] * 2
    assert [plan.log.name for plan in plans] == ["sglang_6.log", "sglang_7.log"]


def test_a_server_on_a_cpu_uses_what_works_there(config, tmp_path):
    python = tmp_path / "python"
    python.touch()
    (plan,) = plan_servers(load_config(str(config), [f"sglang.python={python}", "sglang.max_total_tokens=4096"]).config)
    command = server_command(plan, 1234)
    assert command[command.index("--device") + 1] == "cpu"
    assert command[command.index("--attention-backend") + 1] == "torch_native"
    assert command[command.index("--max-total-tokens") + 1] == "4096"
    assert command[command.index("--host") + 1] == "127.0.0.1"
    paths = server_environment(plan, {"PYTHONPATH": "/elsewhere"})["PYTHONPATH"].split(":")
    assert paths[1:] == ["/elsewhere"]
    assert (Path(paths[0]) / "vllm" / "_custom_ops.py").is_file()
