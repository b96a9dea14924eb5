"""A manifest finds damage, and a damaged checkpoint is never chosen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_copsd.errors import UserError
from megatron_copsd.records import manifest


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "a.distcp").write_bytes(bytes(range(256)) * 100)
    (folder / ".metadata").write_bytes(b"what is where")
    manifest.write(folder, manifest.entries(folder, manifest.files(folder)))
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def test_an_intact_folder(tmp_path: Path) -> None:
    folder = make(tmp_path / "one")
    (folder / ".nfs0001").write_bytes(b"a file system's own")
    assert manifest.damage(folder) == manifest.damage_since(folder) == []


def test_shares_add_up(tmp_path: Path) -> None:
    folder = make(tmp_path / "one")
    flip(folder / "a.distcp")
    found = [text for part in range(3) for text in manifest.damage(folder, part, 3)]
    assert found == ["a.distcp has other content than was written"]


def test_only_later_changes_are_read_after_a_save(tmp_path: Path) -> None:
    folder = make(tmp_path / "one")
    before = (folder / "a.distcp").stat()
    flip(folder / "a.distcp")
    os.utime(folder / "a.distcp", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert manifest.damage_since(folder) == []
    os.utime(folder / "a.distcp", ns=(before.st_atime_ns, before.st_mtime_ns + 10**12))
    assert manifest.damage_since(folder) == ["a.distcp has other content than was written"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "files": {"../x": {"size": 1, "hash": "0"}}}', "[" * 10**5]
)
def test_a_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    folder = make(tmp_path / "one")
    (folder / manifest.NAME).write_text(text, encoding="utf-8")
    (found,) = manifest.damage(folder)
    assert manifest.NAME in found


def test_choice(tmp_path: Path) -> None:
    old, middle, new = (make(tmp_path / name) for name in ("old", "middle", "new"))
    assert manifest.newest_intact([old, middle, new]) == (new, [])
    flip(new / "a.distcp")
    (middle / "a.distcp").unlink()
    path, notes = manifest.newest_intact([old, middle, new])
    assert path == old
    assert [text in note for note, text in zip(notes, ("other content", "missing"), strict=True)] == [True, True]
    with pytest.raises(UserError, match="middle is damaged"):
        manifest.newest_intact([middle, new])
    with pytest.raises(UserError, match=r"a\.distcp is missing"):
        manifest.require_intact(middle)
    (old / manifest.NAME).unlink()
    assert "can't be checked" in manifest.require_intact(old)[0]


@pytest.mark.parametrize("instead", ["nowhere", "a.distcp"])
def test_a_link_that_leads_to_no_file_is_a_file_that_is_missing(tmp_path: Path, instead: str) -> None:
    folder = make(tmp_path / "one")
    (folder / "a.distcp").unlink()
    (folder / "a.distcp").symlink_to(instead)
    assert manifest.damage(folder) == manifest.damage_since(folder) == ["a.distcp is missing"]
