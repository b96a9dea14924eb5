"""Sizes and hashes of a checkpoint's files: written when it is complete, compared before it is read.

They find damage: a bit that flipped, a file that was cut short, lost or exchanged. They are no signature: whoever
changes a checkpoint on purpose can write a manifest that fits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from megatron_copsd.errors import UserError, describe
from megatron_copsd.records.disk import read_text

NAME = "manifest.json"
FORMAT = 1

# Reading and hashing leave Python's lock alone, so threads add up until the disk is the limit.
_THREADS = 4
_BLOCK = 1 << 22


class Entry(NamedTuple):
    """What is known of a file: its size in bytes, and its BLAKE2b hash of 32 bytes in hexadecimal digits."""

    size: int
    hash: str


class Chosen(NamedTuple):
    """A checkpoint to read, and what the user should know about it and about those that were passed over."""

    path: Path
    notes: list[str]


def files(folder: Path) -> list[str]:
    """Names, relative to the folder, of the files that a manifest lists, sorted."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in found if name != NAME)


def entries(folder: Path, names: Sequence[str]) -> dict[str, Entry]:
    """Read files and return their sizes and hashes."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _entry(folder / name), names), strict=True))


def write(folder: Path, found: dict[str, Entry]) -> None:
    """Write the manifest of a folder."""
    listed = {name: found[name]._asdict() for name in sorted(found)}
    tree = {"format": FORMAT, "algorithm": "blake2b-256", "files": listed}
    (folder / NAME).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def exists(folder: Path) -> bool:
    """Whether a checkpoint had a manifest when it was written, and so can be checked."""
    if (folder / NAME).exists():
        return True
    try:
        return "manifest" in json.loads(read_text(folder / "trainer.json"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def damage(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """Compare a folder with its manifest; return what differs, one text a file, or nothing where it has no manifest.

    Args:
        folder: a checkpoint.
        part: which share of the files is hashed, so that several processes can divide the work.
        parts: number of shares.
    """
    return _differences(folder, lambda number, path: number % parts == part)


def damage_since(folder: Path) -> list[str]:
    """Compare as ``damage`` does, but read only the files that were changed after their manifest was written."""
    if not exists(folder):
        return []
    written = (folder / NAME).stat().st_mtime_ns if (folder / NAME).is_file() else 0
    return _differences(folder, lambda number, path: path.stat().st_mtime_ns > written)


def newest_intact(checkpoints: Sequence[Path], find_damage: Callable[[Path], Sequence[str]] = damage) -> Chosen:
    """Return the last of some checkpoints that is not damaged.

    Args:
        checkpoints: at least one, oldest first.
        find_damage: how one is looked through.

    Raises:
        UserError: all are damaged.
    """
    notes: list[str] = []
    for path in reversed(checkpoints):
        differences = find_damage(path)
        if not differences:
            return Chosen(path, [f"{note}; passed over" for note in notes] + unchecked(path))
        notes.append(f"{path} is damaged: {'; '.join(differences)}")
    remedy = "Restore a checkpoint, or give another run.dir to start anew."
    raise UserError("\n".join(describe(note, len(notes), "no intact checkpoint is left", remedy) for note in notes))


def require_intact(path: Path) -> list[str]:
    """Refuse a damaged checkpoint; returns what the user should know about an accepted one.

    Raises:
        UserError: a file differs from the manifest.
    """
    differences = damage(path)
    if differences:
        rule = f"this checkpoint is damaged: {'; '.join(differences)}"
        raise UserError(describe(str(path), path.name, rule, "Restore it, or choose another step."))
    return unchecked(path)


def unchecked(path: Path) -> list[str]:
    """Return a note for a checkpoint of before there were manifests."""
    return [] if exists(path) else [f"{path} has no {NAME}: whether it is intact can't be checked"]


def _differences(folder: Path, is_read: Callable[[int, Path], bool]) -> list[str]:
    if not exists(folder):
        return []
    listed = _read(folder)
    if isinstance(listed, str):
        return [listed]
    # A link to nowhere, or whatever else is no file, has no content to compare.
    present = {name for name in files(folder) if (folder / name).is_file()}
    found = [f"{name} is missing" for name in sorted(listed.keys() - present)]
    # Hidden files that nobody listed are a file system's own.
    found += [f"{name} is not in {NAME}" for name in sorted(present - listed.keys()) if "/." not in f"/{name}"]
    sizes = {name: (folder / name).stat().st_size for name in sorted(listed.keys() & present)}
    found += [
        f"{n} has {size} bytes instead of {listed[n].size}" for n, size in sizes.items() if size != listed[n].size
    ]
    right = [name for name, size in sizes.items() if size == listed[name].size]
    read = [name for number, name in enumerate(right) if is_read(number, folder / name)]
    hashes = entries(folder, read)
    return found + [f"{name} has other content than was written" for name in read if hashes[name] != listed[name]]


def _read(folder: Path) -> dict[str, Entry] | str:
    """Return the entries of a manifest, or what is wrong with it."""
    try:
        tree = json.loads(read_text(folder / NAME))
        if tree["format"] != FORMAT:
            return f"{NAME} has format {tree['format']!r}, this version reads {FORMAT}"
        listed = {str(name): Entry(int(entry["size"]), str(entry["hash"])) for name, entry in tree["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{NAME} can't be read ({type(error).__name__})"
    foreign = [name for name in listed if name in ("", NAME) or ".." in Path(name).parts or Path(name).is_absolute()]
    return f"{NAME} names {foreign[0]!r}, which is no file in the checkpoint" if foreign else listed


def _entry(path: Path) -> Entry:
    state = hashlib.blake2b(digest_size=32)
    size = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            state.update(block)
            size += len(block)
    return Entry(size, state.hexdigest())
