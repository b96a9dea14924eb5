"""Which safetensors files hold a model's weights, and what they say they hold; headers only, no torch.

The choice is that of transformers, which reads ``model.safetensors`` or else what ``model.safetensors.index.json``
lists, and no other file. Where the folder leaves a doubt about which weights are meant, it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_copsd.architecture import Architecture
from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.files import AGAIN, is_folder, read_object
from megatron_copsd.hf.names import hf_shapes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

OUTPUT, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

_TOGETHER = "Check that config.json and the weights belong together."
# Tensors some checkpoints carry although they follow from the rest.
_DERIVED = re.compile(r"rotary_emb\.inv_freq$")
# Bits of the significand and of the exponent: who has at least as many of both holds another's values exactly.
_FLOATS = {"F64": (53, 11), "F32": (24, 8), "F16": (11, 5), "BF16": (8, 8)}
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and how.

    Attributes:
        file: the file that holds it.
        dtype: as safetensors calls it.
        shape: number of rows, columns.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return what a model folder's weight files hold, by tensor name.

    Raises:
        UserError: no file, or more than one, can be meant; one is missing, damaged or contradicts the index or another;
            a tensor has a dtype that no weight of ours has.
    """
    weight_map = _weight_map(folder)
    found: dict[str, StoredTensor] = {}
    for file in sorted({folder / name for name in weight_map.values()}) if weight_map else [folder / SINGLE]:
        opened = open_weights(file, "np")
        for name in opened.keys():  # noqa: SIM118 - safetensors' object is no mapping
            if name in found:
                rule = f"this tensor is in {found[name].file.name} and in {file.name}"
                raise UserError(describe(str(folder), name, rule, "Remove the file that does not belong."))
            part = opened.get_slice(name)
            dtype = part.get_dtype()
            if dtype not in _FLOATS:
                rule = f"tensor {name} is stored as {dtype}; weights are read as {', '.join(_NAMES.values())}"
                remedy = "Convert the model: a quantised or otherwise encoded one can't be trained."
                raise UserError(describe(str(file), dtype, rule, remedy))
            found[name] = StoredTensor(file, dtype, tuple(part.get_shape()))
    for name, file_name in weight_map.items():
        if name not in found or found[name].file.name != file_name:
            where = f"it is in {found[name].file.name}" if name in found else "no file of the index has it"
            rule = f"the index says that {file_name} holds this tensor, and {where}"
            raise UserError(describe(str(folder / INDEX), name, rule, AGAIN))
    return found


def open_weights(file: Path, framework: str) -> Any:
    """Map a safetensors file; ``framework`` is whose tensors it gives, ``np`` or ``pt``.

    Raises:
        UserError: it is not there, not readable or not complete.
    """
    try:
        if not file.is_file():  # a pipe would wait for its writer for ever
            raise UserError(describe(str(file), file.name, "there is no such file", AGAIN))
        return safe_open(file, framework=framework, device="cpu")
    except PermissionError as error:
        rule = "the file may not be read"
        raise UserError(describe(str(file), file.name, rule, "Change its permissions.")) from error
    except (SafetensorError, OSError) as error:
        rule = f"not a complete safetensors file ({error})"
        raise UserError(describe(str(file), file.name, rule, AGAIN)) from error


def check_weights(path: str, architecture: Architecture, dtype: str) -> str | None:
    """Check the headers of a folder's weight files; a hub model's are checked when it is opened.

    Args:
        path: a folder or a hub name.
        architecture: of the model.
        dtype: the run's.

    Returns:
        What to tell the user of the dtypes; None if every weight is kept exactly.

    Raises:
        UserError: see ``stored_tensors`` and ``fit``.
    """
    if not is_folder(path):
        return None
    stored = stored_tensors(Path(path))
    fit(architecture, {name: tensor.shape for name, tensor in stored.items()}, path)
    return rounding({tensor.dtype for tensor in stored.values()}, dtype)


def fit(architecture: Architecture, shapes: Mapping[str, Sequence[int]], origin: str) -> set[str]:
    """Check that tensors are those of a model, whose names are returned.

    The others are harmless: they follow from the rest. An output weight beside a tied embedding has to repeat it, which
    its shape does not show.

    Args:
        architecture: of the model.
        shapes: by the name of each tensor.
        origin: what errors call them.

    Raises:
        UserError: one is missing, has another shape than config.json says, or belongs to no parameter.
    """
    needed: set[str] = set()
    for name, shape in hf_shapes(architecture):
        if name not in shapes:
            rule = "the model needs this tensor and there is none of that name"
            raise UserError(describe(origin, name, rule, _TOGETHER))
        if tuple(shapes[name]) != shape:
            rule = f"this tensor has shape {list(shapes[name])}, and by config.json it is {list(shape)}"
            raise UserError(describe(origin, name, rule, _TOGETHER))
        needed.add(name)
    unknown = {name for name in shapes if name not in needed and not _DERIVED.search(name)}
    if architecture.tied:
        unknown.discard(OUTPUT)
    if unknown:
        rule = f"the {architecture.family} architecture has no parameter for {len(unknown)} such tensor(s)"
        remedy = "Check model_type and num_hidden_layers in config.json, or remove the tensors."
        raise UserError(describe(origin, sorted(unknown)[0], rule, remedy))
    return needed


def rounding(stored: set[str], dtype: str) -> str | None:
    """Say which of the stored dtypes lose digits in ``dtype``; None if none does."""
    (own,) = (_FLOATS[key] for key, name in _NAMES.items() if name == dtype)
    lossy = [_NAMES[key] for key, has in _FLOATS.items() if key in stored and (has[0] > own[0] or has[1] > own[1])]
    return f"weights stored as {' and '.join(lossy)} are rounded to {dtype}" if lossy else None


def _weight_map(folder: Path) -> Mapping[str, str]:
    """Return the file of each tensor by the index; empty where the single file holds all."""
    index, single = folder / INDEX, folder / SINGLE
    if not index.exists():
        if not single.exists():
            raise UserError(_none(folder))
        return {}
    weight_map = _read_index(index)
    if not single.exists():
        missing = sorted({name for name in weight_map.values() if not (folder / name).exists()})
        if missing:
            files = len(set(weight_map.values()))
            rule = f"the index lists {files} file(s), of which {len(missing)} are not in the folder"
            remedy = "Download the missing files, or remove the index if the weights lie in a model.safetensors."
            raise UserError(describe(str(index), missing[0], rule, remedy))
        return weight_map
    if set(weight_map.values()) == {SINGLE}:
        return weight_map
    rule = f"the folder has both {SINGLE} and an index of other files ({INDEX}), and they may differ"
    raise UserError(describe("model.path", str(folder), rule, "Remove the one that is not meant."))


def _read_index(index: Path) -> Mapping[str, str]:
    weight_map = read_object(index, str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        rule = "the index must have a weight_map, an object from tensor names to file names"
        raise UserError(describe(f"{index}: weight_map", weight_map, rule, AGAIN))
    for name, file in weight_map.items():
        # The name itself, not what it resolves to: the hub's cache is made of links.
        if not isinstance(file, str) or Path(file).name != file or "\0" in file or not file.endswith(".safetensors"):
            rule = "must be the name of a .safetensors file in the index's own folder"
            raise UserError(describe(f"{index}: weight_map of {name}", file, rule, AGAIN))
    return weight_map


def _none(folder: Path) -> str:
    """What to say of a folder with neither the single file nor an index."""
    stray = sorted(file.name for file in folder.glob("*.safetensors"))
    if stray:
        rule = f"the folder has neither {SINGLE} nor {INDEX}, and {stray[0]} may be anything"
        remedy = f"Rename the weights to {SINGLE}, or write the index that lists them."
        return describe("model.path", str(folder), rule, remedy)
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
    beside = f"; {pickles[0]} is a pickle, which could run code" if pickles else ""
    rule = f"the folder has no .safetensors file, the only weight format that is read{beside}"
    return describe("model.path", str(folder), rule, "Convert the weights to safetensors.")
