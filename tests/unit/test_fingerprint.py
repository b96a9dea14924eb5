"""The fingerprint of a model's weights: of their values, not of the files they lie in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_copsd.hf.folder import TensorReader

TENSORS = {
    "b.weight": torch.arange(60.0).reshape(3, 20),
    "a.bias": torch.arange(4.0),
    "c.weight": torch.ones(40, 40),
}


def fingerprint(folder: Path, *files: dict[str, torch.Tensor]) -> str:
    folder.mkdir()
    for i, tensors in enumerate(files):
        save_file(tensors, folder / f"part-{i}.safetensors")
    weight_map = {name: f"part-{i}.safetensors" for i, tensors in enumerate(files) for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return TensorReader(folder).fingerprint()


def test_files_and_dtype_do_not_matter(tmp_path: Path) -> None:
    whole = fingerprint(tmp_path / "whole", TENSORS)
    parts = [{name: tensor} for name, tensor in TENSORS.items()]
    assert fingerprint(tmp_path / "parts", *parts) == whole
    assert fingerprint(tmp_path / "half", {n: t.bfloat16() for n, t in TENSORS.items()}) == whole


@pytest.mark.parametrize("name", TENSORS)
def test_every_tensor_matters(tmp_path: Path, name: str) -> None:
    whole = fingerprint(tmp_path / "whole", TENSORS)
    assert fingerprint(tmp_path / "scaled", {**TENSORS, name: TENSORS[name] * 1.001}) != whole
    assert fingerprint(tmp_path / "shorter", {**TENSORS, name: TENSORS[name][1:].contiguous()}) != whole
    assert fingerprint(tmp_path / "renamed", {("x" if n == name else n): t for n, t in TENSORS.items()}) != whole
