"""A folder that is made to be handed on: it appears under its name only when complete, in place of nothing of worth.

A folder NAME is written as NAME.partial. One that takes the place of another moves that to NAME.old first. Both names
may be somebody else's, so ours are known by a marker in the new folder, which says how far the swap may have come.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from megatron_copsd.errors import UserError, describe

COPIED = (
    "generation_config.json",  # stop ids and sampling defaults, which engines read
    "tokenizer.json",  # the tokenizer, all of it
    "tokenizer_config.json",  # its class, special tokens and, of old, its chat template
    "tokenizer.model",  # sentencepiece's, of which the tokenizer may be made
    "special_tokens_map.json",  # special tokens as transformers 4 wrote them
    "added_tokens.json",  # tokens beyond the vocabulary, likewise
    "vocab.json",  # byte-pair vocabulary of tokenizers without tokenizer.json
    "merges.txt",  # and its merges
    "chat_template.jinja",  # how engines write prompts
    "chat_template.json",  # the same, as transformers 4 wrote it
    "LICENSE*",  # has to go with the weights
    "NOTICE*",  # likewise
    "USE_POLICY*",  # likewise, for Llama
)
"""What of a model folder belongs to a model trained from it, beside config.json; not README, which tells of another."""

_MARKER = ".copsd-export"
_WRITING, _COMPLETE = "being written\n", "complete\n"
_WEIGHTS = ("model*.safetensors", "adapter_model.safetensors")
_MODEL_FILES = (
    *COPIED, *_WEIGHTS, "config.json", "adapter_config.json", "model.safetensors.index.json", "README.md",
    "vocab.txt", "*.model", ".gitattributes", _MARKER,
)  # fmt: skip
_LONGEST_FILE = 64  # bytes of the longest name in an export, '.partial' and the slash included
_FORCE = "Choose another folder, or remove what is in the way yourself."


def check_output(out: Path, sources: Mapping[str, Path], replace: bool, size: int) -> None:
    """Refuse a folder that can't be made, or whose making would lose something; nothing is written.

    Args:
        out: the folder to make.
        sources: what must not be lost, by what errors call it.
        replace: whether an earlier export under that name may go.
        size: bytes that will be written, as far as known.

    Raises:
        UserError: see above.
    """
    out = _absolute(out)
    _check_parent(out, size)
    if out.is_symlink():
        raise _refusal(out, f"is a symbolic link to {os.readlink(out)}", "Give the folder that is meant.")
    for called, source in sources.items():
        place = source.resolve()
        if out == place or out in place.parents:
            raise _refusal(out, f"is or contains the {called} ({source})", "Choose another folder.")
        if place in out.parents and (out.exists() or called != "run"):
            raise _refusal(out, f"lies in the {called} ({source})", "Choose another folder.")
    for beside in (_partial(out), _old(out)):
        if os.path.lexists(beside) and not (beside == _partial(out) and _state(beside)):
            rule = f"the export needs the name {beside.name}, which {beside} has; no export of ours began it"
            raise UserError(describe("--out", str(out), rule, f"Move {beside} away, or choose another folder."))
    if not out.exists():
        return
    if not out.is_dir():
        raise _refusal(out, "is a file", "Choose another name.")
    if not replace:
        raise _refusal(out, "exists already", "Choose another folder, or add --force.")
    if reason := _no_export(out):
        raise _refusal(out, f"--force replaces only an earlier export, and {reason}", _FORCE)


def finish_swap(out: Path) -> str | None:
    """Finish what an export that was killed between two renames had begun; returns what was done, for the user.

    Raises:
        UserError: the file system does not let it.
    """
    out = _absolute(out)
    partial, old = _partial(out), _old(out)
    try:
        between = _state(partial) == _COMPLETE and os.path.lexists(old) and not os.path.lexists(out)
        if not between and _state(out) != _COMPLETE:
            return None
        # Somebody may have put a folder of that name there since.
        if os.path.lexists(old) and (reason := "it is a link" if old.is_symlink() else _foreign(old)):
            rule = f"an earlier export was ended while it replaced this folder, and {old.name} is not what it replaced"
            raise _refusal(out, f"{rule}: {reason}", f"Move {old} away.")
        if between:
            os.replace(partial, out)
        if os.path.lexists(old):
            shutil.rmtree(old)
        (out / _MARKER).unlink()
    except OSError as error:
        rule = f"an export that was ended while it replaced this folder can't be finished ({error})"
        raise _refusal(out, rule, f"Keep {out} or {old}, and remove the other.") from error
    return f"finished an earlier export, ended while it replaced {out}"


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which takes the name ``out`` at the end; after an exception it is gone.

    Raises:
        UserError: the disk is full, or the file system refuses a file.
    """
    out = _absolute(out)
    partial = _partial(out)
    try:
        shutil.rmtree(partial) if _state(partial) else None
        partial.mkdir(parents=True)
    except OSError as error:
        raise _refusal(out, f"can't be written ({error})", "Choose another folder.") from error
    try:
        (partial / _MARKER).write_text(_WRITING, encoding="utf-8")
        yield partial
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        rule = f"could not be written to the end, and what was written is removed ({error})"
        raise _refusal(out, rule, "Make room, or choose another folder.") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        _move_into_place(partial, out)
    except OSError as error:
        # Nothing is removed: where the old folder stands aside, the next export finishes the swap.
        raise _refusal(out, f"{partial} is complete and can't take this name ({error})", "Move it yourself.") from error


def _move_into_place(partial: Path, out: Path) -> None:
    """Swap by two renames; ``finish_swap`` knows from the marker how far one came that was ended in between."""
    if not out.exists():
        (partial / _MARKER).unlink()
        os.replace(partial, out)
        return
    (partial / _MARKER).write_text(_COMPLETE, encoding="utf-8")
    os.replace(out, _old(out))
    os.replace(partial, out)
    shutil.rmtree(_old(out))
    (out / _MARKER).unlink()


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _old(out: Path) -> Path:
    return out.with_name(out.name + ".old")


def _state(folder: Path) -> str | None:
    """How far the export had come that wrote this folder; None if none of ours did."""
    try:
        if folder.is_symlink():
            return None
        if folder.is_dir() and not os.listdir(folder):
            return _WRITING  # ended before the marker, or somebody's and without worth
        text = (folder / _MARKER).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    # A marker that the disk had no room for is empty.
    return text if text in (_WRITING, _COMPLETE) else _WRITING


def _no_export(folder: Path) -> str | None:
    """Why a folder may hold more than an export; None if it is one, or is empty."""
    if reason := _foreign(folder):
        return reason
    names = set(os.listdir(folder))
    if names and not names & {"config.json", "adapter_config.json"}:
        return "it has neither config.json nor adapter_config.json"
    if names and not any(_matches(name, _WEIGHTS) for name in names):
        return "it has no weights"
    return None


def _foreign(folder: Path) -> str | None:
    """Name what a folder holds that belongs to no export; None if there is no such thing."""
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return "it may not be changed"
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() or not entry.is_file():
            return f"{entry.name} in it is no file"
        if not _matches(entry.name, _MODEL_FILES):
            return f"{entry.name} in it belongs to no export"
    return None


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_copied(file: Path) -> bool:
    """Whether a file of a model folder goes with the model that was trained from it."""
    return _matches(file.name, COPIED) and file.is_file()


def _absolute(out: Path) -> Path:
    """Return the path with its parents' links resolved, its own name as given."""
    try:
        found = out.resolve() if out.name in ("", "..") else out.parent.resolve() / out.name
    except (OSError, RuntimeError) as error:  # a loop of links, or a name too long to be looked up
        raise UserError(describe("--out", str(out), _reason(error), "Choose another folder.")) from error
    if not found.name:
        raise UserError(describe("--out", str(out), "is the root of the file system", "Choose another folder."))
    return found


def _check_parent(out: Path, size: int) -> None:
    """Refuse a place where no folder can be made, as far as can be told without making it."""
    if len(os.fsencode(out)) + _LONGEST_FILE > os.pathconf("/", "PC_PATH_MAX"):
        raise _refusal(out, "the path is too long", "Choose another folder.")
    try:
        here = next(parent for parent in out.parents if os.path.lexists(parent))
        os.lstat(_partial(out)) if here == out.parent else None
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise _refusal(out, _reason(error), "Choose another folder.") from error
        here = out.parent
    if not here.is_dir():
        raise _refusal(out, f"{here} is no folder", "Choose another folder.")
    longest = os.pathconf(here, "PC_NAME_MAX")
    for name in (*out.relative_to(here).parts[:-1], _partial(out).name):
        if len(os.fsencode(name)) > longest:
            raise _refusal(out, f"a name has at most {longest} bytes, '.partial' included", "Choose a shorter name.")
    if not os.access(here, os.W_OK | os.X_OK):
        raise _refusal(out, f"nothing can be written in {here}", "Change its permissions, or choose another folder.")
    free = shutil.disk_usage(here).free
    if free < size:
        rule = f"the weights need {size / 1e6:,.1f} MB and {here} has {free / 1e6:,.1f} MB free"
        raise _refusal(out, rule, "Make room, or choose another folder.")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return "the name is too long"
    return f"can't be used ({error})"


def _refusal(out: Path, rule: str, remedy: str) -> UserError:
    return UserError(describe("--out", str(out), rule, remedy))
