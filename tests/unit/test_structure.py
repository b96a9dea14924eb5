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

# A module belongs to the layer of its package, or of its own name at the top, and imports from there or from below.
# There are no exceptions by file: a file that needs one stands in the wrong package.
LAYERS = (
    {"types", "errors", "config", "platform", "architecture", "languages", "grading", "signals"},
    {"copsd_kernels"},
    {"data", "hf", "plan", "records"},
    {"model", "loss", "rollout", "methods", "report"},
    {"sync", "evaluate", "convert", "sdrrl"},
    {"engines", "run", "measure", "train", "worker"},
    {"copsd_launch", "copsd_tools"},
)
OURS = ("megatron_copsd", "copsd_kernels", "copsd_launch", "copsd_tools")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "megatron_copsd" else parts[1:]).removesuffix(".__init__")


def layer(module: str) -> int:
    package, _, rest = module.partition(".")
    name = rest.partition(".")[0] if package == "megatron_copsd" else package
    if not name:
        return 0  # the package itself, which imports nothing
    found = [number for number, names in enumerate(LAYERS) if name in names]
    assert found, f"{module} has no layer: add {name!r} to LAYERS"
    return found[0]


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
    path = (
        ROOT.joinpath(parts[0].removeprefix("copsd_"), *parts)
        if parts[0] != "megatron_copsd"
        else ROOT.joinpath(*parts)
    )
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
    if own.startswith(("copsd_kernels", "megatron_copsd.loss", "copsd_launch")):
        assert "megatron" not in roots
    if own.startswith("copsd_launch"):
        assert not roots & {"torch", "transformers"}
    if own.startswith("copsd_kernels"):
        assert not any(name.startswith("torch.distributed") for _, name in imports(path))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 80, f"{path}:{node.lineno}: {node.name} has {length} lines"


@pytest.mark.parametrize("folder", sorted({path.parent for path in SOURCES}), ids=lambda p: str(p.relative_to(ROOT)))
def test_folders_are_small(folder: Path) -> None:
    files = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= (14 if folder.name == "model" else 9), sorted(files)


def test_train_is_a_page_of_verbs() -> None:
    source = (ROOT / "megatron_copsd" / "train.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) < 250
    (step,) = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "train_step")
    assert len([node for node in ast.walk(step) if isinstance(node, ast.stmt)]) <= 25


def test_the_method_is_looked_up_in_one_place() -> None:
    """Everybody else asks ``config.method`` for what it needs, so that a method is added without a search."""
    asked = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "name" and ast.unparse(node.value).endswith("objective")
    ]
    assert len(asked) == 1, asked


def test_files_of_tests_have_names_of_their_own() -> None:
    """pytest imports them by name alone: of two with the same, it collects one, if both are asked for."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(names)


@pytest.mark.parametrize("folder", ["kernels", "launch", "tools"])
def test_folder_is_no_package_of_its_own(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()
