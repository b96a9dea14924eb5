"""HF model folders on disk: where they are, and their tensors read and written as safetensors."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from megatron_copsd.architecture import Architecture
from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.families.keys import GENERATION
from megatron_copsd.hf.files import is_folder, not_fetched, refuse_foreign
from megatron_copsd.hf.outputs import COPIED, is_copied, new_folder
from megatron_copsd.hf.released import as_released
from megatron_copsd.hf.weight_files import EMBEDDING, INDEX, OUTPUT, SINGLE, fit, open_weights, stored_tensors

_TEXT_FILES = (".json", ".txt", ".model", ".jinja")
_MAX_FILE_BYTES = 5 * 2**30


def resolve_folder(path: str, revision: str | None = None) -> Path:
    """Return the local folder of a model: the path itself, or the downloaded snapshot of a hub name.

    Raises:
        UserError: neither a folder nor a hub model that can be reached.
    """
    if is_folder(path):
        return Path(path)
    patterns = ["*.safetensors", INDEX, "config.json", *COPIED, *(f"*{suffix}" for suffix in _TEXT_FILES)]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise not_fetched(path, revision, error) from error


def read_hf_config(path: str, revision: str | None = None) -> PretrainedConfig:
    """Read a model's configuration as transformers does, for what runs or makes its model.

    What it says of sampling, and of the code that computes attention and experts, is left out: the settings say the
    one, and transformers chooses the other by what is installed.

    Raises:
        UserError: transformers refuses it.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # of every kind, where a value is not of its key's
        said = " ".join(str(error).split())
        rule = f"transformers could not read its config.json ({type(error).__name__}: {said})"
        remedy = "Compare the file with the one that the model was published with."
        raise UserError(describe("model.path", path, rule, remedy)) from error
    for key in GENERATION:
        vars(config).pop(key, None)
    config._attn_implementation = config._experts_implementation = None  # no other way to say "by default"
    return config


class TensorSource(Protocol):
    """Where HF tensors come from.

    Attributes:
        origin: what errors call it.
    """

    origin: str

    def names(self) -> set[str]:
        """Names of all tensors."""
        ...

    def shapes(self) -> Mapping[str, Sequence[int]]:
        """Shapes of all tensors by name."""
        ...

    def get(self, name: str) -> torch.Tensor:
        """Return one tensor by name."""
        ...

    def fingerprint(self) -> str:
        """Return a digest of names, shapes and a corner of every tensor, equal for equal weights."""
        ...


class RandomTensors:
    """Freshly initialised weights, the same for a seed under every parallel layout."""

    def __init__(self, config: PretrainedConfig, seed: int) -> None:
        """Initialise as transformers does for this architecture; one process holds the whole model meanwhile."""
        self.origin = f"random initialisation with seed {seed}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self._tensors = as_released(model.state_dict())

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._tensors)

    def shapes(self) -> Mapping[str, Sequence[int]]:
        """Shapes of all tensors by name."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def get(self, name: str) -> torch.Tensor:
        """Return one tensor by name."""
        return self._tensors[name]

    def fingerprint(self) -> str:
        """See ``TensorSource``."""
        return _digest((name, tensor.shape, tensor[_corner(tensor.shape)]) for name, tensor in self._tensors.items())


class TensorReader:
    """The tensors of a folder's safetensors files by name, memory-mapped, read when asked for."""

    def __init__(self, folder: Path) -> None:
        """Find the tensors of ``folder``.

        Raises:
            UserError: see ``stored_tensors``.
        """
        self.origin = str(folder)
        refuse_foreign(folder)
        self._stored = stored_tensors(folder)

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._stored)

    def shapes(self) -> Mapping[str, Sequence[int]]:
        """Shapes of all tensors by name."""
        return {name: tensor.shape for name, tensor in self._stored.items()}

    def get(self, name: str) -> torch.Tensor:
        """Return one tensor as stored."""
        tensor: torch.Tensor = open_weights(self._stored[name].file, "pt").get_tensor(name)
        return tensor

    def fingerprint(self) -> str:
        """See ``TensorSource``; reads some KB a tensor, and is the same however tensors are spread over files."""

        def corners() -> Iterator[tuple[str, Sequence[int], torch.Tensor]]:
            for file in sorted({tensor.file for tensor in self._stored.values()}):
                opened = open_weights(file, "pt")
                for name in opened.keys():  # noqa: SIM118 - safetensors' object is no mapping
                    part = opened.get_slice(name)
                    yield name, part.get_shape(), part[_corner(part.get_shape())]

        return _digest(corners())


def model_tensors(architecture: Architecture, source: TensorSource) -> list[str]:
    """Return the names of the tensors that make a model, sorted; whoever takes them for its weights begins here.

    Raises:
        UserError: they are not the model's, see ``fit``; or the model's output weight is its embedding, and there is
            another beside it.
    """
    needed = fit(architecture, source.shapes(), source.origin)
    if architecture.tied and OUTPUT in source.names() - needed:
        ours, theirs = source.get(EMBEDDING), source.get(OUTPUT)
        if not torch.equal(ours, theirs):
            rule = f"config.json ties the output weight to the embedding, and this tensor differs from {EMBEDDING}"
            remedy = "Set tie_word_embeddings to false if both were trained, or remove the tensor."
            raise UserError(describe(source.origin, OUTPUT, rule, remedy))
    return sorted(needed)


def _corner(shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(16) for _ in shape)


def _digest(corners: Iterable[tuple[str, Sequence[int], torch.Tensor]]) -> str:
    lines = sorted(
        f"{name} {list(shape)} {hashlib.blake2b(corner.float().numpy().tobytes(), digest_size=8).hexdigest()}"
        for name, shape, corner in corners
    )
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def write_folder(out: Path, tensors: Iterable[tuple[str, torch.Tensor]], source: Path, dtype: torch.dtype) -> int:
    """Write a HF model folder that appears under its name only when it is complete.

    Args:
        out: the folder to make; an existing one is replaced.
        tensors: HF names and full tensors; at most one file's worth is held at once.
        source: folder whose configuration and tokenizer files are copied.
        dtype: dtype to store.

    Returns:
        Bytes of weights written.

    Raises:
        UserError: the folder could not be written; nothing is left of it.
    """
    with new_folder(out) as partial:
        for file in sorted(source.iterdir()):
            if is_copied(file):
                shutil.copyfile(file, partial / file.name)
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        _write_text(partial / "config.json", json.dumps(config, indent=2) + "\n")
        return _write_tensors(partial, tensors, dtype)


def _write_tensors(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> int:
    files: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal size
        file = folder / f"part-{len(files)}.safetensors"
        save_file(pending, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors writes for the owner alone, and checkpoints are handed to other teams
        files.append(list(pending))
        pending.clear()
        size = 0

    for name, tensor in tensors:
        stored = tensor.detach().to(device="cpu", dtype=dtype).contiguous().clone()
        if pending and size + stored.nbytes > _MAX_FILE_BYTES:
            flush()
        pending[name] = stored
        size += stored.nbytes
        total += stored.nbytes
    flush()
    if len(files) == 1:
        os.replace(folder / "part-0.safetensors", folder / SINGLE)
        return total
    weight_map: dict[str, str] = {}
    for i, names in enumerate(files):
        final = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        os.replace(folder / f"part-{i}.safetensors", folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return total


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
