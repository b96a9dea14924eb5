"""Which safetensors files hold a model's weights, and what they say they hold; headers only, no torch.

The choice is that of transformers, which reads ``model.safetensors`` or else what ``model.safetensors.index.json``
lists, and no other file. Where the folder leaves a doubt about which weights are meant, it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_copsd.errors import UserError, describe

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_AGAIN = "Download or convert the model again."
# Bits of the significand and of the exponent: who has at least as many of both holds another's values exactly.
_FLOATS = {"F64": (53, 11), "F32": (24, 8), "F16": (11, 5), "BF16": (8, 8)}
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and how.

    Attributes:
        file: the file that holds it.
        dtype: as safetensors calls it.
    """

    file: Path
    dtype: str


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
            dtype = opened.get_slice(name).get_dtype()
            if dtype not in _FLOATS:
                rule = f"tensor {name} is stored as {dtype}; weights are read as {', '.join(_NAMES.values())}"
                remedy = "Convert the model: a quantised or otherwise encoded one can't be trained."
                raise UserError(describe(str(file), dtype, rule, remedy))
            found[name] = StoredTensor(file, dtype)
    for name, file_name in weight_map.items():
        if name not in found or found[name].file.name != file_name:
            where = f"it is in {found[name].file.name}" if name in found else "no file of the index has it"
            rule = f"the index says that {file_name} holds this tensor, and {where}"
            raise UserError(describe(str(folder / INDEX), name, rule, _AGAIN))
    return found


def open_weights(file: Path, framework: str) -> Any:
    """Map a safetensors file; ``framework`` is whose tensors it gives, ``np`` or ``pt``.

    Raises:
        UserError: it is not there, not readable or not complete.
    """
    try:
        if not file.is_file():  # a pipe would wait for its writer for ever
            raise UserError(describe(str(file), file.name, "there is no such file", _AGAIN))
        return safe_open(file, framework=framework, device="cpu")
    except PermissionError as error:
        rule = "the file may not be read"
        raise UserError(describe(str(file), file.name, rule, "Change its permissions.")) from error
    except (SafetensorError, OSError) as error:
        rule = f"not a complete safetensors file ({error})"
        raise UserError(describe(str(file), file.name, rule, _AGAIN)) from error


def check_weights(path: str, dtype: str) -> str | None:
    """Check the headers of a folder's weight files; a hub model's are checked when it is opened.

    Args:
        path: a folder or a hub name.
        dtype: the run's.

    Returns:
        What to tell the user of the dtypes; None if every weight is kept exactly.

    Raises:
        UserError: see ``stored_tensors``.
    """
    if not Path(path).is_dir():
        return None
    return rounding({tensor.dtype for tensor in stored_tensors(Path(path)).values()}, dtype)


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
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        rule = f"the index of the weights could not be read ({error or type(error).__name__})"
        raise UserError(describe(str(index), index.name, rule, _AGAIN)) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        rule = "the index must have a weight_map, an object from tensor names to file names"
        value = weight_map if isinstance(content, dict) else type(content).__name__
        raise UserError(describe(f"{index}: weight_map", value, rule, _AGAIN))
    for name, file in weight_map.items():
        # The name itself, not what it resolves to: the hub's cache is made of links.
        if not isinstance(file, str) or Path(file).name != file or "\0" in file or not file.endswith(".safetensors"):
            rule = "must be the name of a .safetensors file in the index's own folder"
            raise UserError(describe(f"{index}: weight_map of {name}", file, rule, _AGAIN))
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
