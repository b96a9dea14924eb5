"""Rules of the source tree: which package may import which, and how long a file or function may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    p for folder in ("megatron_copsd", "kernels", "launch", "tools") for p in sorted((ROOT / folder).rglob("*.py"))
]

# Longest matching prefix decides; a module may import from its own layer and from lower ones.
LAYERS = {
    "megatron_copsd": 0,
    "megatron_copsd.types": 0,
    "megatron_copsd.config": 0,
    "megatron_copsd.errors": 0,
    "megatron_copsd.platform": 0,
    "megatron_copsd.languages": 0,
    "copsd_kernels": 1,
    "megatron_copsd.data": 2,
    "megatron_copsd.monitor": 2,
    "megatron_copsd.eval.grading": 2,
    "megatron_copsd.eval.metrics": 2,
    "megatron_copsd.eval.numbers": 2,
    "megatron_copsd.eval.numerals": 2,
    "megatron_copsd.eval.translation": 2,
    "megatron_copsd.hf": 2,
    "megatron_copsd.hf.load": 3,
    "megatron_copsd.hf.gather": 3,
    "megatron_copsd.plan": 3,
    "megatron_copsd.model": 3,
    "megatron_copsd.loss": 3,
    "megatron_copsd.rollout": 3,
    "megatron_copsd.sync": 4,
    "megatron_copsd.objectives": 4,
    "megatron_copsd.eval": 4,
    "megatron_copsd.assemble": 5,
    "megatron_copsd.agreement": 5,
    "megatron_copsd.engines": 5,
    "megatron_copsd.reports": 5,
    "megatron_copsd.throughput": 5,
    "megatron_copsd.train": 5,
    "megatron_copsd.train_worker": 5,
    "launch": 6,
    "copsd_tools": 6,
}
OURS = ("megatron_copsd", "copsd_kernels", "launch", "copsd_tools")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    renamed = ({"kernels": "copsd_kernels", "tools": "copsd_tools"}.get(parts[0], parts[0]), *parts[1:])
    return ".".join(renamed).removesuffix(".__init__")


def layer(module: str) -> int:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in LAYERS:
            return LAYERS[".".join(parts[:end])]
    raise AssertionError(f"{module} has no layer: add it to LAYERS")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module
            yield node.lineno, node.module
            # "from package import module" names the module only here.
            yield from (
                (node.lineno, f"{node.module}.{a.name}") for a in node.names if is_module(f"{node.module}.{a.name}")
            )


def is_module(name: str) -> bool:
    parts = name.split(".")
    parts[0] = {"copsd_kernels": "kernels", "copsd_tools": "tools"}.get(parts[0], parts[0])
    path = ROOT.joinpath(*parts)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    own = module_name(path)
    for line, name in imports(path):
        if name.split(".")[0] in OURS:
            assert layer(name) <= layer(own), f"{path}:{line}: layer {layer(own)} imports {name} of layer {layer(name)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_forbidden_packages(path: Path) -> None:
    own = module_name(path)
    roots = {name.split(".")[0] for _, name in imports(path)}
    assert "sglang" not in roots
    if own.startswith(("copsd_kernels", "megatron_copsd.loss", "launch")):
        assert "megatron" not in roots
    if own.startswith("launch"):
        assert not roots & {"torch", "transformers"}
    if own.startswith("copsd_kernels"):
        assert not any(name.startswith("torch.distributed") for _, name in imports(path))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.name != "table.py":  # the language table is data
        assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 80, f"{path}:{node.lineno}: {node.name} has {length} lines"


def test_train_is_a_page_of_verbs() -> None:
    assert len((ROOT / "megatron_copsd" / "train.py").read_text(encoding="utf-8").splitlines()) < 300


def test_kernels_folder_is_no_package_of_its_own() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
