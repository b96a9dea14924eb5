"""Reading a checkpoint's pickles without running what they name.

A pickle names functions and calls them. torch's distributed checkpoints have one that torch reads with the whole of
pickle's power (``.metadata``), and small objects that it reads so too. While ``restricted`` holds, the same code of
torch and Megatron reads through a list of allowed classes: what is checked is what is used.
"""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException

from megatron_copsd.errors import UserError, describe
from megatron_copsd.records.disk import read_text

# What torch's Metadata is made of. Whole names: a module's other names reach further modules.
_ALLOWED = {
    "builtins": {"dict", "frozenset", "list", "set", "tuple"},
    "collections": {"OrderedDict"},
    "torch": {"Size"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.serialization": {"_get_layout"},
}
_REMEDY = "Don't use this checkpoint: take one whose origin you know. Nothing of it was run."
# Megatron's other formats are read by further libraries.
_BACKENDS = {"sharded_backend": ("torch_dist",), "common_backend": ("torch", None)}


@contextlib.contextmanager
def restricted(folder: Path) -> Iterator[None]:
    """While it holds, torch reads pickles of known classes alone; for reading the checkpoint in ``folder``.

    Raises:
        UserError: a pickle names something else, or the checkpoint is of a format that we don't write.
    """
    _require_our_format(folder)
    refused: list[UserError] = []
    reader = _Reader(folder, refused, torch.load)
    # Before torch does, which prints a traceback of whatever this raises.
    with (folder / ".metadata").open("rb") as file:
        reader.load(file)
    try:
        # torch looks its pickle module and torch.load up by these names at each call.
        with _replaced(filesystem, "pickle", reader), _replaced(torch, "load", reader.load_tensors):
            yield
    except (Exception, CheckpointException):
        # torch wraps what a reader raises.
        if refused:
            raise refused[0] from None
        raise


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@dataclass(frozen=True)
class _Reader:
    """Stands in for torch's ``pickle`` module and for ``torch.load``.

    Attributes:
        folder: the checkpoint.
        refused: gets the error of every refusal.
        torch_load: the real one.
    """

    folder: Path
    refused: list[UserError]
    torch_load: Any

    def load(self, file: IO[bytes]) -> object:
        """Read ``.metadata``."""
        return _MetadataUnpickler(file, self).load()

    def load_tensors(self, file: Any, *arguments: Any, **options: Any) -> Any:
        """Read tensors and plain containers alone, whatever the caller wanted."""
        try:
            return self.torch_load(file, *arguments, **{**options, "weights_only": True})
        except pickle.UnpicklingError as error:
            name = Path(file).name if isinstance(file, str | Path) else "*.distcp"
            raise self.refuse(name, _reason(error)) from error

    def refuse(self, name: str, value: str) -> UserError:
        """Note and return the error for a file that names something that is not allowed."""
        rule = "a checkpoint may name tensors, plain containers and torch's descriptions of them, nothing else"
        error = UserError(describe(str(self.folder / name), value, rule, _REMEDY))
        self.refused.append(error)
        return error


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], reader: _Reader) -> None:
        super().__init__(file)
        self._reader = reader

    def find_class(self, module: str, name: str) -> object:
        """Look a name up, as ``pickle`` does, if it is one of those that metadata is made of."""
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if is_dtype or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise self._reader.refuse(".metadata", f"{module}.{name}")


def _reason(error: pickle.UnpicklingError) -> str:
    """The line of torch's long text that says what was found."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "GLOBAL" in line or "WeightsUnpickler error" in line] or lines or [""]
    return telling[0][:200]


def _require_our_format(folder: Path) -> None:
    path = folder / "metadata.json"
    try:
        found = json.loads(read_text(path))
        wrong = [name for name, known in _BACKENDS.items() if found.get(name) not in known]
    except (OSError, ValueError, AttributeError) as error:
        rule = f"this checkpoint can't be read ({type(error).__name__}: it does not say its format)"
        raise UserError(
            describe(str(path), path.name, rule, "Restore the file, or take another checkpoint.")
        ) from error
    if wrong:
        rule = f"{wrong[0]} must be {_BACKENDS[wrong[0]][0]}"
        raise UserError(describe(str(path), found.get(wrong[0]), rule, _REMEDY))
