"""LoRA: the same adapters under every layout, a teacher that is the original model, and exports that agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from processes import ROOT, Command, copsd_each, train
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import make_model, settings, write_config
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-5
LAYOUTS = ["single", "tp2", "tp2-sp", "pp2", "pp2-recompute", "tp2-sp-recompute", "pp2-vpp2", "dp2"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CASES = {"all": ("qwen3", TARGETS), "some": ("qwen2", ["q_proj", "v_proj", "up_proj"])}


def lora_config(folder: Path, family: str, **lora: object) -> Path:
    model = make_model(folder / "model", family, num_hidden_layers=4)
    # A large learning rate, for a change that shows; 7 rollouts divide by neither replicas nor microbatches.
    sections = {"rollout": {"prompts_per_step": 7}, "optimizer": {"lr": 1e-2, "eps": 1e-4}}
    return write_config(folder, settings(folder, model, lora={"rank": 4, **lora}, **sections))


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What each case came to under each layout, all from one start of two processes."""
    folder = tmp_path_factory.mktemp("layouts")
    configs = {}
    for name, (family, targets) in CASES.items():
        (folder / name).mkdir()
        configs[name] = lora_config(folder / name, family, targets=targets)
    worker = ROOT / "tests" / "support" / "lora_worker.py"
    printed = run_ranks([worker, *configs.values()], 2, folder, groups=len(CASES) * len(LAYOUTS))
    results = {name: config.parent / "results.pt" for name, config in configs.items()}
    assert all(path.is_file() for path in results.values()), printed
    return {name: torch.load(path, weights_only=True) for name, path in results.items()}


@pytest.mark.parametrize("case", CASES)
def test_layouts(layouts: dict[str, dict], case: str) -> None:
    results = dict(layouts[case])
    single = results.pop("single")
    assert [*results] == LAYOUTS[1:]
    for name, result in results.items():
        assert result["before"].keys() == single["before"].keys()
        assert all(torch.equal(result["before"][key], single["before"][key]) for key in single["before"]), name
        for ours, theirs in zip(result["steps"], single["steps"], strict=True):
            assert ours == pytest.approx(theirs, rel=TOLERANCE), name
        difference, size, change = (
            sum(float((one[key] - other[key]).double().square().sum()) for key in one) ** 0.5
            for one, other in (
                (result["after"], single["after"]),
                (single["after"], {key: torch.zeros_like(tensor) for key, tensor in single["after"].items()}),
                (single["after"], single["before"]),
            )
        )
        print(f"{name}: adapters differ by {difference / size:.1e}, they changed by {change / size:.1e}")
        assert difference < TOLERANCE * size
        assert change > 0.01 * size


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A configuration and its run, trained by two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("lora")
    config = lora_config(folder, "qwen3", alpha=6)
    train(config, "parallel.tensor=2", "run.steps=2", processes=2)
    return config, folder / "run"


def test_exports_agree_with_peft(trained: tuple[Path, Path], tmp_path: Path) -> None:
    config, run = trained
    exports = (
        ("export", run, "--out", tmp_path / "merged"),
        ("export", run, "--out", tmp_path / "adapter", "--adapter"),
    )
    for done in copsd_each([Command(export) for export in exports], tmp_path / "said"):
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_alpha"] == 6
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(config.parent / "model").double()
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").double()(ids).logits
        before = base(ids).logits
        ours = PeftModel.from_pretrained(base, tmp_path / "adapter").double()(ids).logits
    assert float((ours - before).abs().max()) > 0.1
    difference = float((ours - merged).abs().max()) / float(ours.abs().max())
    print(f"merged differs from base and adapter in peft by {difference:.1e} of the largest logit")
    assert difference < 1e-6


def test_checkpoint_holds_adapters_alone_and_knows_its_base(trained: tuple[Path, Path], tmp_path: Path) -> None:
    config, run = trained
    saved = json.loads((run / "checkpoints" / "step_00000002" / "trainer.json").read_text())["adaptation"]
    assert saved == {"rank": 4, "scale": 1.5, "targets": sorted(TARGETS), "base": saved["base"]}
    stored = FileSystemReader(run / "checkpoints" / "step_00000002").read_metadata().state_dict_metadata
    tensors = [key for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata)]
    assert sum(key.startswith("decoder.") for key in tensors) == 4 * 2 * len(TARGETS)  # layers, A and B
    assert all(".adapters." in key for key in tensors), tensors
    other = tmp_path / "other"
    other.mkdir()
    for file in (config.parent / "model").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    changed = {"lora.rank=8": "lora.rank: 8", f"model.path={other}": "model.path (fingerprint of its weights)"}
    commands = [Command(("train", config, override, "run.steps=3")) for override in changed]
    for done, name in zip(copsd_each(commands, tmp_path / "said"), changed.values(), strict=True):
        assert done.returncode == 2
        assert name in done.stderr
