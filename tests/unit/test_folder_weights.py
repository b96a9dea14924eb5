"""Which weights file of a model folder is read: what transformers reads, or an error that names the files."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import copsd
from safetensors.torch import save_file
from tiny import make_model, settings, write_config

from megatron_copsd.architecture import Architecture
from megatron_copsd.errors import UserError
from megatron_copsd.hf.folder import TensorReader, model_tensors
from megatron_copsd.hf.names import hf_shapes
from megatron_copsd.hf.read import FAMILIES, architecture_from, read_architecture
from megatron_copsd.hf.weight_files import INDEX, check_weights, rounding

ARCHITECTURE = architecture_from({"model_type": "llama"}, "model")
A, B = {"a": torch.ones(2, 2)}, {"b": torch.ones(3)}


def write_index(folder: Path, content: object) -> None:
    (folder / INDEX).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def write_raw(file: Path, dtype: str, size: int) -> None:
    header = json.dumps({"a": {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


def shards(folder: Path, **weight_map: object) -> None:
    save_file(A, folder / "one.safetensors")
    save_file(B, folder / "two.safetensors")
    write_index(folder, {"weight_map": {"a": "one.safetensors", "b": "two.safetensors", **weight_map}})


@pytest.mark.parametrize("stray", ["model_backup.safetensors", "a.safetensors", "zz.safetensors"])
def test_stray_files_are_not_read(tmp_path: Path, stray: str) -> None:
    save_file(A, tmp_path / "model.safetensors")
    save_file({"a": torch.zeros(2, 2)}, tmp_path / stray)
    assert torch.equal(TensorReader(tmp_path).get("a"), A["a"])


def test_an_index_is_followed(tmp_path: Path) -> None:
    shards(tmp_path)
    save_file({"a": torch.zeros(2, 2)}, tmp_path / "three.safetensors")
    reader = TensorReader(tmp_path)
    assert reader.names() == {"a", "b"}
    assert torch.equal(reader.get("a"), A["a"])


def test_an_index_of_the_single_file_agrees_with_it(tmp_path: Path) -> None:
    save_file(A, tmp_path / "model.safetensors")
    write_index(tmp_path, {"weight_map": {"a": "model.safetensors"}})
    assert TensorReader(tmp_path).names() == {"a"}


def both(folder: Path) -> None:
    shards(folder)
    save_file(A, folder / "model.safetensors")


def single_beside_stale_index(folder: Path) -> None:
    save_file(A, folder / "model.safetensors")
    write_index(folder, {"weight_map": {"a": "gone.safetensors"}})


def missing_shard(folder: Path) -> None:
    shards(folder)
    (folder / "two.safetensors").unlink()


def repeated(folder: Path) -> None:
    shards(folder)
    save_file({**A, **B}, folder / "two.safetensors")


def swapped(folder: Path) -> None:
    shards(folder, a="two.safetensors", b="one.safetensors")


def pipe(folder: Path) -> None:
    shards(folder)
    (folder / "two.safetensors").unlink()
    os.mkfifo(folder / "two.safetensors")


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (both, ("model.safetensors and an index", INDEX, "Remove the one")),
        (single_beside_stale_index, ("model.safetensors and an index", INDEX, "Remove the one")),
        (missing_shard, (INDEX, "'two.safetensors'", "2 file(s), of which 1", "Download the missing")),
        (lambda f: write_index(f, {"weight_map": {"a": "x.safetensors"}}), ("x.safetensors", "or remove the index")),
        (repeated, ("'a'", "one.safetensors and in two.safetensors")),
        (swapped, (INDEX, "'a'", "it is in one.safetensors")),
        (lambda f: shards(f, c="two.safetensors"), (INDEX, "'c'", "no file of the index has it")),
        (lambda f: shards(f, b="../two.safetensors"), (INDEX, "'../two.safetensors'", "own folder")),
        (lambda f: shards(f, b="/etc/two.safetensors"), (INDEX, "'/etc/two.safetensors'", "own folder")),
        (lambda f: shards(f, b="sub/../two.safetensors"), (INDEX, "own folder")),
        (lambda f: shards(f, b=3), (INDEX, "weight_map of b", "3")),
        (lambda f: shards(f, b="two.bin"), (INDEX, "two.bin", ".safetensors file")),
        (lambda f: write_index(f, "{"), (INDEX, "could not be read")),
        (lambda f: write_index(f, ""), (INDEX, "could not be read")),
        (lambda f: write_index(f, "[" * 100_000), (INDEX, "could not be read")),
        (lambda f: write_index(f, []), (INDEX, "not an object, but list")),
        (lambda f: write_index(f, {}), (INDEX, "weight_map", "None")),
        (lambda f: write_index(f, {"weight_map": {}}), (INDEX, "weight_map", "{}")),
        (lambda f: write_index(f, {"weight_map": ["a"]}), (INDEX, "weight_map", "['a']")),
        (lambda f: save_file(A, f / "weights.safetensors"), ("weights.safetensors", "Rename")),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b"x"), ("pytorch_model.bin", "pickle", "safetensors")),
        (lambda f: (f / "model.safetensors").mkdir(), ("model.safetensors", "no such file")),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), ("model.safetensors", "not a complete")),
        (pipe, ("two.safetensors", "no such file")),
    ],
)  # fmt: skip
def test_doubtful_folders_are_refused(tmp_path: Path, spoil: Callable[[Path], None], names: tuple[str, ...]) -> None:
    spoil(tmp_path)
    for read in (TensorReader, lambda folder: check_weights(str(folder), ARCHITECTURE, "float32")):
        with pytest.raises(UserError) as error:
            read(tmp_path)
        for name in names:
            assert name in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "size"), [("F8_E4M3", 1), ("F8_E5M2", 1), ("BOOL", 1), ("C64", 8), ("I64", 8), ("U8", 1)]
)
def test_only_floats_are_weights(tmp_path: Path, dtype: str, size: int) -> None:
    write_raw(tmp_path / "model.safetensors", dtype, size)
    with pytest.raises(UserError, match=f"tensor a is stored as {dtype}"):
        TensorReader(tmp_path)


@pytest.mark.parametrize(
    ("stored", "run", "said"),
    [
        ({"F32"}, "bfloat16", "weights stored as float32 are rounded to bfloat16"),
        ({"F64", "F16"}, "float32", "weights stored as float64 are rounded to float32"),
        ({"F16", "BF16"}, "bfloat16", "weights stored as float16 are rounded to bfloat16"),
        ({"F64", "F32"}, "bfloat16", "weights stored as float64 and float32 are rounded to bfloat16"),
        ({"F16", "BF16", "F32"}, "float32", None),
        ({"BF16"}, "bfloat16", None),
    ],
)
def test_rounding_is_said(stored: set[str], run: str, said: str | None) -> None:
    assert rounding(stored, run) == said


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_those_of_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    # No two sizes alike.
    sizes = {"hidden_size": 32, "head_dim": 12, "num_attention_heads": 4, "num_key_value_heads": 2}
    if family == "qwen2":
        del sizes["head_dim"]
    folder = make_model(tmp_path, family, tie_word_embeddings=tied, **sizes)
    architecture, reader = read_architecture(str(folder)), TensorReader(folder)
    assert dict(hf_shapes(architecture)) == reader.shapes()
    assert model_tensors(architecture, reader) == sorted(reader.names())
    assert check_weights(str(folder), architecture, "float32") is None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


def changed(tiny: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> tuple[Path, Architecture]:
    """The tiny model with other tensors, and its architecture."""
    reader = TensorReader(tiny)
    tensors = {name: reader.get(name) for name in reader.names()}
    change(tensors)
    shutil.copy(tiny / "config.json", folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder, read_architecture(str(folder))


EMBEDDING, OUTPUT, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.input_layernorm.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda t: t.pop(NORM), (NORM, "there is none of that name", "belong together")),
        (lambda t: t.pop(EMBEDDING), (EMBEDDING, "there is none of that name")),
        (lambda t: t.update({QUERY: t[QUERY].T}), (QUERY, "has shape [32, 64]", "it is [64, 32]")),
        (lambda t: t.update({EMBEDDING: t[EMBEDDING][:-1]}), (EMBEDDING, "has shape", "config.json")),
        (lambda t: t.update({NORM: t[NORM].reshape(1, -1)}), (NORM, "has shape [1, 32]")),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[NORM].clone()}),
            ("layers.2", "no parameter for 1"),
        ),
        (lambda t: t.update({"score.weight": t[NORM].clone()}), ("score.weight", "no parameter for 1", "remove")),
        (lambda t: t.update({OUTPUT: t[EMBEDDING] + 1}), (OUTPUT, "ties the output", "tie_word_embeddings")),
        (lambda t: t.update({OUTPUT: t[EMBEDDING][:5].clone()}), (OUTPUT, "ties the output", "tie_word_embeddings")),
    ],
)
def test_weights_of_another_model_are_refused(
    tiny: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], names: tuple[str, ...]
) -> None:
    folder, architecture = changed(tiny, tmp_path, change)
    with pytest.raises(UserError) as error:
        model_tensors(architecture, TensorReader(folder))
    for name in (str(folder), *names):
        assert name in str(error.value)


def test_what_follows_from_the_rest_is_left_out(tiny: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[OUTPUT] = tensors[EMBEDDING].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    folder, architecture = changed(tiny, tmp_path, change)
    assert model_tensors(architecture, TensorReader(folder)) == sorted(TensorReader(tiny).names())


def test_a_size_that_is_a_slip_is_not_counted_to(tiny: Path) -> None:
    read = read_architecture(str(tiny))
    endless = dataclasses.replace(read, layers=10**12)
    with pytest.raises(UserError, match=r"model\.layers\.2\..*there is none of that name"):
        model_tensors(endless, TensorReader(tiny))


def test_check_finds_it_without_loading_weights(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    config = write_config(tmp_path, settings(tmp_path, model))
    done = copsd("train", config, "--check", "model.dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("weights stored as float32 are rounded to bfloat16") == 1
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    done = copsd("train", config, "--check")
    assert done.returncode == 2, done.stderr
    assert "config.yaml:" in done.stderr
    assert "pytorch_model.bin is a pickle" in done.stderr
    assert "Traceback" not in done.stderr
