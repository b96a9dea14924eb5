"""The tests of the losses can fail: each of these bugs, planted in a copy of the sources, is caught by one of them."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Bug:
    """A replacement in one source file, and the tests that must fail with it and pass without."""

    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]
    interpret: bool = False


MATRIX = "tests/kernels/triton_matrix.py"
BUGS = {
    "a masked column counts in the softmax": Bug(
        "kernels/copsd_kernels/chunk_rows.py",
        "tl.where(inside, tl.exp(shifted), 0.0)",
        "tl.exp(shifted)",
        (f"{MATRIX}::test_shapes",),
        interpret=True,
    ),
    "a masked column counts in the divergence": Bug(
        "kernels/copsd_kernels/chunk_rows.py",
        "tl.sum(tl.where(inside, capped, 0.0), axis=0)",
        "tl.sum(capped, axis=0)",
        (f"{MATRIX}::test_shapes",),
        interpret=True,
    ),
    "the running sum is not rescaled": Bug(
        "kernels/copsd_kernels/chunk_rows.py",
        "d = rescale * d +",
        "d = d +",
        (f"{MATRIX}::test_cross_entropy",),
        interpret=True,
    ),
    "a streamed column beyond the vocabulary counts in the divergence": Bug(
        "kernels/copsd_kernels/streaming/kernels.py",
        "_row_sum(entries, inside)",
        "tl.sum(entries, axis=1).to(tl.float64)",
        (f"{MATRIX}::test_shapes", "-k", "streaming and 31"),
        interpret=True,
    ),
    "splits of the columns are not joined": Bug(
        "kernels/copsd_kernels/streaming/tiles.py",
        "RowSums(parts.sum(dim=0)) if sums",
        "RowSums(parts[0]) if sums",
        (f"{MATRIX}::test_shapes", "-k", "streaming and 64"),
        interpret=True,
    ),
    "the label of another row": Bug(
        "kernels/copsd_kernels/streaming/kernels.py",
        "ids[None, :] == label[:, None]",
        "ids[None, :] == tl.max(label)",
        (f"{MATRIX}::test_cross_entropy", "-k", "streaming"),
        interpret=True,
    ),
    "the sum over shards is dropped": Bug(
        "megatron_copsd/loss/chunked.py",
        "            sum_over_shards_(sums.numbers, views.group)\n",
        "",
        ("tests/distributed/test_loss_tensor_parallel.py", "-k", "2 and (jsd or clip)"),
    ),
    "each shard has a softmax of its own": Bug(
        "megatron_copsd/loss/chunked.py",
        "gather_shards(parts, group).split",
        "parts[None].split",
        ("tests/distributed/test_loss_tensor_parallel.py", "-k", "2 and forward_kl"),
    ),
    "logits are rounded to bfloat16": Bug(
        "megatron_copsd/loss/chunked.py",
        "            yield Chunk(",
        "            [view.copy_(view.bfloat16()) for view in logits]\n            yield Chunk(",
        ("tests/kernels/test_divergence.py::test_near_teacher_keeps_its_gradient_in_bfloat16",),
    ),
    "clipped entries keep their gradient": Bug(
        "kernels/copsd_kernels/torch_rows.py",
        "    _zero_(p, clipped)\n",
        "",
        ("tests/kernels/test_parity.py",),
    ),
    "the gradient's total is forgotten": Bug(
        "kernels/copsd_kernels/torch_rows.py",
        "if gradient.total is not None:",
        "if False:",
        ("tests/kernels/test_parity.py",),
    ),
}


def run(tree: Path, *arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """Run Python with the packages of a tree before the installed ones."""
    packages = os.pathsep.join(str(folder) for folder in (tree, tree / "kernels", tree / "tools"))
    environment = os.environ | {"PYTHONPATH": packages, "OMP_NUM_THREADS": "1"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True)


def run_tests(tree: Path, *tests: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    options = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow")
    return run(tree, *options, *tests, interpret=interpret)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, whose packages come before the installed ones."""
    folder = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("megatron_copsd", "kernels", "tools", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(tree, name):
    bug = BUGS[name]
    path = tree / bug.file
    original = path.read_text(encoding="utf-8")
    assert original.count(bug.text) == 1, "the sources have changed: plant the bug elsewhere"
    path.write_text(original.replace(bug.text, bug.replacement), encoding="utf-8")
    try:
        done = run_tests(tree, *bug.tests, interpret=bug.interpret)
    finally:
        path.write_text(original, encoding="utf-8")
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert " failed" in done.stdout


def test_the_copy_without_a_bug_passes(tree):
    """So that what the others see is their bug."""
    shown = run(tree, "-c", "import copsd_kernels.torch_rows as k, megatron_copsd as m; print(k.__file__, m.__file__)")
    assert all(Path(file).is_relative_to(tree) for file in shown.stdout.split())
    near_teacher = "tests/kernels/test_divergence.py::test_near_teacher_keeps_its_gradient_in_bfloat16"
    done = run_tests(tree, "tests/kernels/test_parity.py", near_teacher)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    triton = run_tests(tree, f"{MATRIX}::test_shapes", f"{MATRIX}::test_cross_entropy", interpret=True)
    assert triton.returncode == 0, triton.stdout[-2000:] + triton.stderr[-2000:]
