"""A model's files by name, from its folder or from the hub; those in JSON as objects. No torch."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from megatron_copsd.errors import UserError, describe

AGAIN = "Download or convert the model again."
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# What else may say what a model is, by the name of its file; a model read without it would be another.
_FOREIGN = {
    "adapter_config.json": (
        "beside the model lies an adapter, which would not be applied",
        "Merge it into the weights (merge_and_unload of peft), or move its files away.",
    ),
    "quantize_config.json": ("the weights are quantised", "Give the unquantised model."),
    "hf_quant_config.json": ("the weights are quantised", "Give the unquantised model."),
}


def is_folder(path: str) -> bool:
    """Whether a model lies in a folder here; if not, its name is one that the hub may have.

    Raises:
        UserError: there is no such folder, and it is no name of the hub's.
    """
    if os.path.isdir(path):
        if not os.access(path, os.R_OK | os.X_OK):
            raise UserError(describe("model.path", path, "the folder may not be read", "Change its permissions."))
        return True
    if os.path.lexists(path):
        remedy = "Give the folder that holds the model's config.json and weights."
        raise UserError(describe("model.path", path, "is not a folder that can be read", remedy))
    missing = "is no folder here"
    if _HUB_NAME.fullmatch(path):
        first = path.partition("/")[0]
        if not os.path.isdir(first):
            return False
        # A name mistyped within a folder that is here must not fetch a stranger's model.
        rule = f"{missing}, though {first}/ is"
        remedy = "Correct it; for the hub's model of that name, start where there is no such folder."
        raise UserError(describe("model.path", path, rule, remedy))
    if path.startswith("~"):
        raise UserError(describe("model.path", path, f"{missing}: ~ is taken as it stands", "Write the whole path."))
    remedy = "Correct the path, which starts at the current directory, or give a hub name (owner/name)."
    raise UserError(describe("model.path", path, missing, remedy))


def model_file(path: str, name: str, revision: str | None = None) -> Path | None:
    """Return a file of a model, fetched if its folder is not here; None where the model has none of that name.

    Args:
        path: a folder, or a hub name.
        name: of the file.
        revision: of the hub model: branch, tag or commit.

    Raises:
        UserError: there is no such model, or the hub can't be reached.
    """
    if is_folder(path):
        file = Path(path) / name
        return file if os.path.lexists(file) else None
    # Folders need none of this, and it takes a while to import.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(path, name, revision=revision))
    except (OSError, ValueError, HfHubHTTPError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise not_fetched(path, revision, error) from error


def not_fetched(path: str, revision: str | None, error: Exception) -> UserError:
    """Say in our words why the hub gave nothing; its own are about its servers."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return UserError(
            describe("model.path", path, "the hub's model is gated", "Ask for access there, and set HF_TOKEN.")
        )
    if isinstance(error, RepositoryNotFoundError):
        rule = "is no folder here, and the hub has no public model of that name"
        return UserError(describe("model.path", path, rule, "Correct it; for a private model, set HF_TOKEN."))
    if isinstance(error, RevisionNotFoundError):
        rule = f"the hub's model {path} has no such branch, tag or commit"
        return UserError(describe("model.revision", revision, rule, "Correct it, or remove it for the newest."))
    rule = "is no folder here, and the hub could not be reached for a model of that name"
    remedy = "Correct the path, or see to the network; a folder needs none."
    return UserError(describe("model.path", path, rule, remedy))


def read_object(file: Path, where: str) -> dict[str, Any]:
    """Return what a file in JSON says, which has to be an object.

    Args:
        file: the file.
        where: what errors call its model.

    Raises:
        UserError: it can't be read, is no JSON object, or says something twice.
    """

    def refuse(why: str) -> UserError:
        return UserError(describe(where, str(file), f"{file.name} could not be read ({why})", AGAIN))

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise refuse(f"{key!r} stands there twice")
            found[key] = value
        return found

    if not file.is_file():  # a pipe would wait for its writer for ever
        raise refuse("not a file")
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once)
    except UserError:
        raise
    except OSError as error:
        raise refuse(error.strerror or type(error).__name__) from error
    except (ValueError, RecursionError) as error:
        raise refuse(f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise refuse(f"not an object, but {type(content).__name__}")
    return content


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder in which something else than config.json and weights has a say in what the model is.

    Raises:
        UserError: names the file.
    """
    for name, (rule, remedy) in _FOREIGN.items():
        if os.path.lexists(folder / name):
            raise UserError(describe(f"model.path ({folder})", name, rule, remedy))
