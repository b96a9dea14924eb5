"""The command line: help that waits for nothing heavy, mistakes named alike everywhere, readers that go away."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from processes import ROOT, copsd, environment

from copsd_tools.bench.command import COMMANDS as BENCHMARKS
from copsd_tools.cli import COMMANDS

# What takes seconds to import, and what they pull in.
HEAVY = {"torch", "transformers", "megatron", "datasets", "numpy", "matplotlib", "nemo_run"}
ALL = [
    (),
    *((name,) for name in COMMANDS.commands),
    ("evaluate", "accuracy"),
    ("evaluate", "translation"),
    *(("bench", name) for name in BENCHMARKS.commands),
]


@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_help_imports_nothing_heavy(command: tuple[str, ...]) -> None:
    code = (
        "import sys\n"
        "from copsd_tools.cli import main\n"
        "try:\n"
        "    code = main(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        "    code = end.code\n"
        f"print(*sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "\n", "these were imported"
    assert done.stdout.startswith(" ".join(["usage: copsd", *command]))


def test_version_has_the_commit_of_a_checkout() -> None:
    done = copsd("--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("copsd ")
    assert ("commit" in done.stdout) == (ROOT / ".git").exists()


@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [
        (("train", "--help-settings"), "1"),
        (("train", "--help-settings"), ""),
        (("train", "--help"), ""),
        (("--help",), ""),
    ],
)
def test_a_reader_that_goes_away_is_no_fault(arguments: tuple[str, ...], unbuffered: str) -> None:
    """As ``head`` does after its lines: seen at the first line, or when everything is written in the end."""
    variables = {**environment(), "PYTHONUNBUFFERED": unbuffered}
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "copsd_tools.cli", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=variables, check=False)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 141


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("train", "x.yaml", "--nproc", "x"), "argument --nproc: 'x': must be a whole number of at least 1"),
        (("plan", "x.yaml", "--gpus", "0"), "argument --gpus: '0': must be a whole number of at least 1"),
        (("plan", "x.yaml", "--gpus", "8", "--fill", "x"), "argument --fill: 'x': must be a number above 0"),
        (("plan", "x.yaml", "--gpus", "8", "--fill", "1.5"), "argument --fill: '1.5': must be a number above 0"),
        (("bench", "loss", "--rows", "-1"), "argument --rows: '-1': must be a whole number of at least 1"),
        (("launch", "train", "x.yaml", "--on", "local", "--nproc", "²"), "argument --nproc: '²': must be"),
        (("bench", "sync"), "the following arguments are required: CONFIG\n"),
        (("plan", "--gpus", "8"), "the following arguments are required: CONFIG\n"),
        (("bench", "nothing"), "copsd bench: 'nothing': no such command. Known: loss, kernels"),
        (("nothing",), "copsd: 'nothing': no such command. Known: train, evaluate"),
    ],
)
def test_mistakes_are_told_in_the_same_words(arguments: tuple[str, ...], says: str) -> None:
    done = copsd(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_may_stand_after_options() -> None:
    done = copsd("bench", "packing", "none.yaml", "--repeats", "2", "run.steps=1")
    assert done.returncode == 2
    assert "none.yaml" in done.stderr
    assert "unrecognized" not in done.stderr
