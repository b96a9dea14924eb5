"""Mutated inputs of every command: refused in words, or accepted without another meaning; nothing else is touched.

``fuzz_mutations`` says what is changed and what must then stay; ``fuzz_worker`` runs the commands and judges.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from processes import ROOT, python

WORKER = ROOT / "tests" / "support" / "fuzz_worker.py"
SEED = 14
PARTS, MUTATIONS = 8, 1000


def fuzz(folder: Path, first: int, count: int) -> None:
    """Run some mutations and fail with all that is wrong, each with the command that runs it again."""
    done = python(WORKER, folder, SEED, first, count)
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == count, done.stderr
    wrong = [
        f"{report['command']}: {report['what']}: {'; '.join(report['wrong'])}\n{report['said']}\n"
        f"again: python {WORKER.relative_to(ROOT)} FOLDER {SEED} {report['number']} 1\n"
        for report in reports
        if report["wrong"]
    ]
    assert not wrong, f"{len(wrong)} of {count}\n\n" + "\n".join(wrong)
    # Both must come about, or the mutations have lost their teeth.
    codes = Counter(report["code"] for report in reports)
    assert codes[0] > 0
    assert codes[2] > 0


def test_some_mutations(tmp_path: Path) -> None:
    fuzz(tmp_path / "fuzz", 0, 20)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_a_thousand_mutations(part: int, tmp_path: Path) -> None:
    share = MUTATIONS // PARTS
    fuzz(tmp_path / "fuzz", part * share, share)
