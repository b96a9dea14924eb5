"""Configuration files: overrides, defaults, round trip, and rules between settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from processes import ROOT

from megatron_copsd.config.check import check, size_problems
from megatron_copsd.config.dump import dump_config
from megatron_copsd.config.load import load_config
from megatron_copsd.config.schema import Config, Settings
from megatron_copsd.config.settings import parts
from megatron_copsd.errors import UserError, describe

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
BASE = {"model": {"path": "m"}, "data": {"train": [{"path": "some/hub-set", "layout": "released", "language": "SWA"}]}}
SOURCE = BASE["data"]["train"][0]
GRPO = {"objective": {"name": "grpo"}}
SFT = {"objective": {"name": "sft"}}


def write(folder: Path, **sections: object) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**BASE, **sections}, sort_keys=False), encoding="utf-8")
    return path


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, optimizer={"lr": 1e-3})
    overrides = [
        "optimizer.lr=2e-5",
        "run.name=a b",
        "data.train.0.count=5",
        "rollout.stop_token_ids=[1,2]",
        "eval.top_p=1",
    ]
    config = load_config(path, overrides).config
    assert config.optimizer.lr == 2e-5
    assert config.run.name == "a b"
    assert config.data.train[0].count == 5
    assert config.rollout.stop_token_ids == (1, 2)
    assert config.eval.top_p == 1.0


def test_a_comment_in_an_override_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.name=a #b.*comment"):
        load_config(write(tmp_path), ["run.name=a #b"])
    assert load_config(write(tmp_path), ["run.name='a #b'"]).config.run.name == "a #b"


def test_printed_configuration_reads_back(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), ["loss.entry_clip=0.05"]).config
    (tmp_path / "again.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml").config == config


def test_every_setting_is_described() -> None:
    def check(section: type[Settings]) -> None:
        for name, setting in section.model_fields.items():
            assert setting.description, name
            if part := parts(setting.annotation)[0]:
                check(part)

    for field in Config.model_fields.values():
        check(field.annotation)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configurations_are_valid(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optimizer": {"lr": 1e-5, "min_lr": 1e-3}}, r"config\.yaml:\d+: optimizer\.min_lr: 0\.001: must not exceed"),
        ({"objective": {"name": "grpo"}}, r"rollout\.samples_per_prompt: 1: grpo compares"),
        ({"objective": {"name": "sft"}, "rollout": {"samples_per_prompt": 4}}, r"config\.yaml:\d+: rollout\.samples"),
        ({"teacher": {"ema_decay": 0.9}}, r"teacher\.ema_decay: 0\.9: has no effect"),
        ({"prompt": {"template": "plain", "thinking": "prefix"}}, r"prompt\.thinking: 'prefix'"),
        ({"log": {"wandb_project": "p"}}, r"log\.wandb_project: 'p': wandb is not installed"),
        ({"teacher": {"cache": "host", "cache_mb": 1}}, r"teacher\.cache_mb: 1\.0: has no effect"),
        (
            {"optimizer": {"teacher_micro_batch_size": 8, "teacher_micro_batch_tokens": 4096}},
            r"optimizer\.teacher_micro_batch_size: 8: optimizer\.teacher_micro_batch_tokens says",
        ),
        ({"lora": {"alpha": 32}}, r"config\.yaml:\d+: lora\.alpha: 32\.?0?: has no effect with lora\.rank = 0"),
        (
            {"lora": {"rank": 8, "targets": ["q_proj", "v_proj", "q_proj"]}},
            r"config\.yaml:\d+: lora\.targets\.2: 'q_proj': is named twice",
        ),
        ({"eval": {"every": 5}}, r"data\.eval: \[\]: evaluation is asked for"),
        ({"parallel": {"sequence": True}}, r"parallel\.sequence: True: cuts the sequence over tensor-parallel ranks"),
        (
            {"parallel": {"virtual_pipeline": 2}},
            r"parallel\.virtual_pipeline: 2: cuts up a pipeline, and parallel\.pip",
        ),
        ({"parallel": {"last_stage_layers": 1}}, r"parallel\.last_stage_layers: 1: cuts up a pipeline"),
        (
            {"parallel": {"recompute_layers": 1}},
            r"parallel\.recompute_layers: 1: has no effect with parallel\.recompute =",
        ),
        ({"eval": {"samples": 4}}, r"eval\.temperature: 0: with temperature 0"),
        ({"eval": {"top_p": 0.5}}, r"eval\.top_p: 0\.5: has no effect with eval\.temperature = 0"),
        (
            {"model": {"path": ".", "revision": "v2"}},
            r"model\.revision: 'v2': has no effect where model\.path is a fol",
        ),
        ({"optimizer": {"min_lr": 1e-6}}, r"optimizer\.min_lr: 1e-06: has no effect with optimizer\.decay = constant"),
        ({"rollout": {"agreement_limit": 0.1}}, r"rollout\.agreement_limit: 0\.1: has no effect with rollout\.agreem"),
        ({"data": {"train": [{**SOURCE, "weight": 2.0}]}}, r"data\.train\.0\.weight: 2\.0: has no effect with no ot"),
        ({"data": {"train": [SOURCE], "eval": [{**SOURCE, "weight": 2.0}]}}, r"data\.eval\.0\.weight: 2\.0: has no"),
        ({"data": {"train": [SOURCE], "ungradable": "drop"}}, r"data\.ungradable: 'drop': has no effect: nothing is"),
        ({**GRPO, "rollout": {"samples_per_prompt": 2, "ahead": 1}}, r"rollout\.ahead: 1: policy\.ratio = one"),
        (
            {**GRPO, "rollout": {"samples_per_prompt": 2, "top_p": 0.9}},
            r"rollout\.top_p: 0\.9: grpo changes .* Set 1\.0",
        ),
        ({**GRPO, "rollout": {"samples_per_prompt": 2, "top_k": 9}}, r"rollout\.top_k: 9: grpo changes .* Set 0\."),
        ({**GRPO, "loss": {"entry_clip": 0.1}}, r"loss\.entry_clip: 0\.1: has no effect with objective\.name = grpo"),
        (
            {**GRPO, "teacher": {"weights": "live"}},
            r"teacher\.weights: 'live': has no effect with objective\.name = grpo",
        ),
        ({**GRPO, "prompt": {"include_solution": False}}, r"prompt\.include_solution: False: has no effect with obj"),
        ({**GRPO, "optimizer": {"teacher_micro_batch_size": 2}}, r"optimizer\.teacher_micro_batch_size: 2: has no eff"),
        ({**SFT, "loss": {"divergence": "jsd"}}, r"loss\.divergence: 'jsd': has no effect with objective\.name = sft"),
        ({**SFT, "teacher": {"cache": "host"}}, r"teacher\.cache: 'host': has no effect with objective\.name = sft"),
        (
            {**SFT, "rollout": {"temperature": 0.7}},
            r"rollout\.temperature: 0\.7: has no effect with objective\.name = s",
        ),
        ({**SFT, "rollout": {"save_every": 5}}, r"rollout\.save_every: 5: has no effect with objective\.name = sft"),
    ],
)
def test_rules_between_settings(tmp_path: Path, sections: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(load_config(write(tmp_path, **sections)))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_a_run_can_start_from_the_configuration_it_wrote(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COPSD_DATA", "data")
    loaded = load_config(path)
    for source in (*loaded.config.data.train, *loaded.config.data.eval):
        for name in filter(None, (source.path, source.english, source.solutions)):
            if Path(name).suffix:
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).touch()
    check(loaded)
    Path("again.yaml").write_text(dump_config(loaded.config), encoding="utf-8")
    again = load_config("again.yaml")
    check(again)
    assert again.config == loaded.config


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"sglang": {"devices": [0]}}, "sglang.devices: [0]: has no effect in training with rollout.engine = embedded"),
        (
            {**SFT, "rollout": {"engine": "sglang"}, "sglang": {"verify": "checksum"}},
            "sglang.verify: 'checksum': has no",
        ),
        ({"rollout": {"engine": "sglang", "batch_size": 8}}, "rollout.batch_size: 8: has no effect with"),
        ({"rollout": {"engine": "sglang"}, "sglang": {"verify_limit": 0.5}}, "sglang.verify_limit: 0.5: has no effect"),
        (
            {"rollout": {"engine": "sglang"}, "sglang": {"urls": ["http://a:1"], "servers": 2}},
            "sglang.servers: 2: has no effect on servers that run already",
        ),
        ({"optimizer": {"micro_batch_tokens": 99, "micro_batch_size": 9}}, "optimizer.micro_batch_size: 9: has no eff"),
        ({"eval": {"temperature": 0.5}}, "eval.temperature: 0.5: has no effect in training"),
        ({"rollout": {"save_every": 101}}, "rollout.save_every: 101: has no effect as the run ends before"),
        ({"rollout": {"agreement_every": 500}}, "rollout.agreement_every: 500: has no effect as the run ends before"),
        (
            {"data": {"train": [SOURCE], "eval": [SOURCE]}, "eval": {"every": 200, "at_end": True}},
            "eval.every: 200: has no effect as the run ends before, after run.steps = 100",
        ),
    ],
)
def test_settings_of_other_commands_and_engines_are_said(tmp_path: Path, sections: dict, said: str) -> None:
    notes = check(load_config(write(tmp_path, **sections)))
    assert [said in note for note in notes] == [True], notes
    assert not check(load_config(write(tmp_path)))


def test_home_folders_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/asha")
    source = {**SOURCE, "path": "~/p.tsv", "layout": "parallel", "english": "~/e.tsv", "solutions": "~/s.jsonl"}
    path = write(tmp_path, data={"train": [source]}, model={"path": "~/models/m"})
    config = load_config(path, ["run.dir=~/runs/x", "sglang.folder=~/w", "sglang.python=~/env/bin/python"]).config
    assert (config.run.dir, config.model.path) == ("/home/asha/runs/x", "/home/asha/models/m")
    assert (config.sglang.folder, config.sglang.python) == ("/home/asha/w", "/home/asha/env/bin/python")
    read = config.data.train[0]
    assert (read.path, read.english, read.solutions) == ("/home/asha/p.tsv", "/home/asha/e.tsv", "/home/asha/s.jsonl")
    (tmp_path / "child.yaml").write_text("extends: ~/base.yaml\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"'/home/asha/base\.yaml': no such file"):
        load_config(tmp_path / "child.yaml")
    with pytest.raises(UserError, match=r"run\.dir: '~nobody_here/x': ~nobody_here names no user's home folder"):
        load_config(path, ["run.dir=~nobody_here/x"])


@pytest.mark.parametrize(
    "override",
    [
        "run.steps=100000000", "run.seed=9999999999", "rollout.prompts_per_step=1000000000",
        "rollout.samples_per_prompt=1000000000", "rollout.max_response_tokens=9999999999", "eval.samples=1000000000",
        "rollout.bucket_mb=1e300", "loss.scratch_mb=1e300", "parallel.timeout_s=1e300", "sglang.sync_timeout_s=1e12",
        "sglang.servers=1000000000", "parallel.tensor=1000000000", "rollout.batch_size=1000000000",
        "optimizer.beta1=1", "optimizer.beta2=1.0", "sglang.concurrency=10000000000",
    ],
)  # fmt: skip
def test_numbers_that_nothing_could_hold_are_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match=r"^command line .*: input should be less than"):
        load_config(write(tmp_path), [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.teacher_top_k=1000000000", r"loss\.teacher_top_k: 1000000000: the model's vocabulary has 320 tokens"),
        ("loss.teacher_top_k=321", r"loss\.teacher_top_k: 321: "),
        ("lora.rank=33", r"lora\.rank: 33: no projection of the model has a rank above its hidden size of 32"),
        ("rollout.max_response_tokens=2048", r"rollout\.max_response_tokens: 2048: the model takes sequences of 2048"),
        ("eval.max_response_tokens=5000", r"eval\.max_response_tokens: 5000: the model takes"),
        ("rollout.stop_token_ids=[1,99999]", r"rollout\.stop_token_ids\.1: 99999: the model's vocabulary has 320"),
    ],
)
def test_numbers_beyond_the_model_are_refused(tmp_path: Path, override: str, message: str) -> None:
    config = load_config(write(tmp_path), [override]).config
    with pytest.raises(UserError, match=message):
        raise UserError("\n".join(describe(*problem) for problem in size_problems(config, 320, 32, 2048)))


def test_numbers_that_the_model_takes(tmp_path: Path) -> None:
    overrides = ["loss.teacher_top_k=320", "lora.rank=32", "rollout.max_response_tokens=2047"]
    assert size_problems(load_config(write(tmp_path), overrides).config, 320, 32, 2048) == []


def test_an_unknown_projection_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.yaml:\d+: lora\.targets\.1: 'query'.*'q_proj'.*'down_proj'"):
        load_config(write(tmp_path, lora={"rank": 8, "targets": ["v_proj", "query"]}))


def test_two_held_out_sources_of_one_name(tmp_path: Path) -> None:
    source = BASE["data"]["train"][0]
    data = {"train": [source], "eval": [source, source]}
    with pytest.raises(UserError, match=r"data\.eval\.1\.name: 'hub-set-swa': another held-out source, data\.eval\.0"):
        check(load_config(write(tmp_path, data=data)))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["policy.ratio=sampled", "objective.name=copsd"], "policy.ratio: 'sampled': has no effect with objective"),
        (["policy.clip_high=0.28"], "policy.clip_high: 0.28: has no effect with policy.ratio = one"),
        (["rollout.ahead=1", "rollout.engine=sglang"], "rollout.ahead: 1: policy.ratio = one takes the trained policy"),
        (["rollout.top_p=0.9", "policy.ratio=sampled"], "rollout.top_p: 0.9: grpo changes the whole distribution"),
        (["rollout.ahead=1", "rollout.engine=sglang", "policy.ratio=sampled"], ""),
    ],
)  # fmt: skip
def test_what_a_policy_gradient_may_be_sampled_with(tmp_path: Path, overrides: list[str], said: str) -> None:
    config = write(tmp_path, **GRPO, rollout={"samples_per_prompt": 4})
    try:
        check(load_config(config, overrides))
    except UserError as error:
        found = str(error)
        assert said
        assert said in found
    else:
        assert not said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["prompt.student_thinking=empty"], "prompt.student_thinking: 'empty': a plain prompt has no thinking block"),
        (["prompt.teacher_thinking=prefix"], "prompt.teacher_thinking: 'prefix': a plain prompt has no thinking"),
        (["eval.thinking=empty"], "eval.thinking: 'empty': a plain prompt has no thinking block"),
        (
            [
                "prompt.template=chat", "prompt.thinking=empty", "prompt.student_thinking=off",
                "prompt.teacher_thinking=empty",
            ],
            "prompt.thinking: 'empty': has no effect with student_thinking and teacher_thinking",
        ),
        (["prompt.template=chat", "prompt.teacher_thinking=empty", "objective.name=grpo"], "prompt.teacher_thinking"),
    ],
)  # fmt: skip
def test_thinking_of_each_role_is_held_to_the_others(tmp_path: Path, overrides: list[str], said: str) -> None:
    config = write(tmp_path, prompt={"template": "plain"})
    with pytest.raises(UserError) as raised:
        check(load_config(config, overrides))
    assert said in str(raised.value)
