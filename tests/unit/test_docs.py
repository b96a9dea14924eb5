"""Files, definitions and settings that the documentation names between backticks are there."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from megatron_copsd.config.schema import Config

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# A path is told from the root, or from the folder of a package or of the tests.
FOLDERS = (
    "",
    "megatron_copsd",
    "kernels",
    "kernels/copsd_kernels",
    "tools/copsd_tools",
    "launch/copsd_launch",
    "tests",
)
SUFFIXES = ("", ".py")
NAMED = re.compile(r"`([\w.-]+(?:/[\w.-]+)*/?)(?:::(\w+))?`")
SETTING = re.compile(r"`([a-z]+)\.([a-z]\w*)(?:\.[\w.]+)?(?:[=:][^`]*)?`")
IDENTIFIER = re.compile(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)`")
FILE_SUFFIXES = ("py", "safetensors")  # ``model.safetensors`` is no setting of the section ``model``
COMMIT = re.compile(r"[0-9a-f]{7}")


def places(path: str) -> list[Path]:
    return [place for folder in FOLDERS for end in SUFFIXES if (place := ROOT / folder / (path + end)).exists()]


def is_path(text: str) -> bool:
    """Whether it has to exist: a module, or what stands in a folder of ours; ``Qwen/Qwen3-8B`` does not."""
    first, slash, _ = text.partition("/")
    return text.endswith(".py") or (bool(slash) and bool(places(first)))


@cache
def source() -> str:
    folders = ("megatron_copsd", "kernels", "launch", "tools", "tests")
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_are_named_exist(document: Path) -> None:
    wrong = []
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), start=1):
        for path, name in NAMED.findall(line):
            found = places(path)
            defined = re.compile(rf"^\s*(?:def|class) {name}\b|^{name}\b", re.MULTILINE)
            if is_path(path) and not found:
                wrong.append(f"{number}: {path}")
            elif name and not any(defined.search(file.read_text(encoding="utf-8")) for file in found):
                wrong.append(f"{number}: {path}::{name}")
    assert not wrong


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_settings_that_are_named_exist(document: Path) -> None:
    sections = {name: field.annotation.model_fields for name, field in Config.model_fields.items()}
    named = set(SETTING.findall(document.read_text(encoding="utf-8")))
    unknown = [(section, key) for section, key in named if section in sections and key not in sections[section]]
    assert not [name for name in unknown if name[1] not in FILE_SUFFIXES]


def test_identifiers_in_the_recipes_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = [name for name in IDENTIFIER.findall(text) if not is_path(name) and not COMMIT.fullmatch(name)]
    parts = {part for name in names for part in name.split(".")}
    assert not [part for part in sorted(parts) if not re.search(rf"\b{part}\b", source())]
