"""A disk that takes no more, at each kind of write: one error that names the file, nothing good lost, on with room.

Small file systems stand in for the disk, in a mount namespace of the test's own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from layouts import selected
from processes import PATIENCE, ROOT, environment, train
from tiny import make_model, settings, write_config

PAGE = 4  # KiB


@dataclass(frozen=True)
class Case:
    """Sizes in KiB of small file systems by folder below the run, what is set, and the file that the error names."""

    mounts: dict[str, int]
    names: str
    overrides: tuple[str, ...] = ()


OWN = {"checkpoints": 65536, "rollouts": 65536, "tensorboard": 65536}
CASES = {
    # Pages for the lock, format.json, config.yaml and the first lines.
    "metrics": Case({"": 4 * PAGE, **OWN}, "metrics.jsonl"),
    "config": Case({"": 2 * PAGE, **OWN}, "config.yaml"),
    "rollouts": Case({"rollouts": 2 * PAGE}, "rollouts/step_000001.jsonl", ("rollout.save_every=1",)),
    "checkpoint": Case({"checkpoints": 1300}, "step_00000004.partial"),
    "first checkpoint": Case({"checkpoints": 100}, "step_00000002.partial"),
    "tensorboard": Case({"tensorboard": PAGE}, "tensorboard", ("log.tensorboard=true",)),
}


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was seen in each of the module's cases, and the numbers of a run that met no full disk."""
    folder = tmp_path_factory.mktemp("disk")
    sections = {"run": {"steps": 10}, "checkpoint": {"save_every": 2}, "rollout": {"save_every": 0}}
    config = write_config(folder, settings(folder, make_model(folder / "model"), **sections))
    plan = [
        {
            "name": name,
            "run": str(folder / name),
            "mounts": CASES[name].mounts,
            "arguments": ["train", str(config), f"run.dir={folder / name}", *CASES[name].overrides],
        }
        for name in selected(request)
    ]
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    worker = ROOT / "tests" / "support" / "full_disk_worker.py"
    apart = ["unshare", "--user", "--map-root-user", "--mount"]
    done = subprocess.run(
        [*apart, sys.executable, worker, folder / "plan.json", folder / "out"],
        capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    train(config, f"run.dir={folder / 'whole'}")
    whole = (folder / "whole" / "metrics.jsonl").read_text(encoding="utf-8")
    return {**json.loads((folder / "out").read_text(encoding="utf-8")), "whole": whole}


def losses(text: str) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in map(json.loads, text.splitlines())]


@pytest.mark.parametrize("case", CASES)
def test_full_disk(found: dict[str, Any], case: str) -> None:
    seen = found[case]
    assert seen["code"] == 2, seen["printed"]
    error = seen["printed"].partition("error:\n")[2]
    assert CASES[case].names in error
    assert "No space left on device" in error
    assert len(error.splitlines()) == 1, error
    assert "Traceback" not in seen["printed"]
    assert seen["partial"] == []
    assert seen["damage"] == []
    assert seen["code_with_room"] == 0, seen["printed_with_room"]
    assert losses(seen["metrics"]) == losses(found["whole"])


@pytest.mark.parametrize("case", ["checkpoint"])
def test_the_last_checkpoint_is_kept(found: dict[str, Any], case: str) -> None:
    assert found[case]["kept"] == ["step_00000002"]
    assert "2 steps done" in found[case]["printed_with_room"]


def test_what_was_evaluated_is_not_lost(tmp_path: Path) -> None:
    """The numbers are on the screen, and the file of an earlier evaluation is as it was."""
    (tmp_path / "text").write_text("Maembe kumi na nane.\n", encoding="utf-8")
    arguments = ("evaluate", "translation", "--hypotheses", tmp_path / "text", "--references", tmp_path / "text")
    place = tmp_path / "full"
    done = on_a_full_disk(place, "-m", "copsd_tools.cli", *arguments, "--out", place / "before")
    assert done.returncode == 2, done.stderr
    assert "BLEU 100.0" in done.stdout.partition("left:")[0]
    assert f"{place / 'before'}: " in done.stderr
    assert "can't be written (No space left on device; 0.0 MB are free there)" in done.stderr
    assert "take the numbers from above" in done.stderr
    assert done.stdout.partition("left:")[2].split() == ["before", "fill", "x"]


def test_a_line_of_a_benchmark_is_whole_or_not_there(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from copsd_tools.bench.csv_lines import append_rows;"
        "append_rows(pathlib.Path(sys.argv[1]), ['x'], [[number] for number in range(9999)])"
    )
    done = on_a_full_disk(tmp_path / "full", "-c", program, tmp_path / "full" / "before")
    assert "it can't be written (No space left on device" in done.stderr
    assert done.stdout.partition("left:")[2].split() == ["before", "fill", "x"]


def on_a_full_disk(place: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python where a file system at ``place`` holds a file of one line, ``before``, and has no more room.

    After what the program prints comes "left:", with the names of the files there, and that file's text.
    """
    script = (
        'mount -t tmpfs -o size=8k tmpfs "$0" && echo x > "$0/before" && cat /dev/zero > "$0/fill" 2> /dev/null;'
        '"$@"; code=$?; echo left: $(ls "$0") $(cat "$0/before"); exit $code'
    )
    place.mkdir()
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, place, sys.executable, *arguments]
    return subprocess.run(
        [*map(str, words)],
        capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT, env=environment(), check=False,
    )  # fmt: skip
