"""What a run has recorded, read back: its own lines and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_copsd.config.schema import Config
from megatron_copsd.errors import UserError
from megatron_copsd.records.monitor import Monitor
from megatron_copsd.records.paths import FORMAT, RunFolder, step_of
from megatron_copsd.records.reader import read_metrics, read_rollouts, recorded_lines

LINES = [
    {"step": 1, "loss": 0.5, "reward": 1.0},
    {"step": 2, "eval/held/accuracy": 0.25},
    {"step": 2, "loss": 0.25},
    {"step": 4, "eval/held/accuracy": 0.5, "eval/other/accuracy": 1.0},
]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.begin()
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    return folder


def test_steps_and_evaluations(run: RunFolder) -> None:
    metrics = read_metrics(run.root)
    assert metrics.steps == (LINES[0], LINES[2])
    assert metrics.evaluations == (LINES[1], LINES[3])
    assert metrics.evaluated("held", "accuracy") == {2: 0.25, 4: 0.5}
    assert metrics.evaluated("other", "accuracy") == {4: 1.0}
    assert metrics.evaluated("absent", "accuracy") == {}


def test_a_last_line_that_was_cut_short_is_left_out(run: RunFolder) -> None:
    with run.metrics.open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')
    assert len(read_metrics(run.root).steps) == 2


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 3, "lo\n',
        "[3]\n",
        '{"loss": 1}\n',
        "3",
        '{"step": "3"}\n',
        '{"step": ' + "1" * 5000 + "}\n",
        "[" * 10**5 + "\n",
        "\0\n",
    ],
    ids=("cut", "list", "no step", "number", "step is text", "5,000 digits", "deep", "zero byte"),
)
def test_other_lines_are_named(run: RunFolder, line: str) -> None:
    with run.metrics.open("a", encoding="utf-8") as file:
        file.write(line)
    for read in (lambda: read_metrics(run.root), lambda: recorded_lines(run.metrics)):
        with pytest.raises(UserError, match=r"metrics\.jsonl:5"):
            read()


@pytest.mark.parametrize("kind", ["binary", "folder", "link to nowhere"])
def test_a_record_that_is_none_is_refused_and_left_alone(run: RunFolder, kind: str) -> None:
    run.metrics.unlink()
    if kind == "binary":
        run.metrics.write_bytes(b'{"step": 1}\n\xff\n')
    elif kind == "folder":
        run.metrics.mkdir()
    else:
        run.metrics.symlink_to("nowhere")
    source = {"path": "x.jsonl", "layout": "released", "language": "SWA"}
    config = Config.model_validate({"model": {"path": "x"}, "data": {"train": [source]}, "log": {"tensorboard": False}})
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        Monitor(config, run, 1).__enter__()
    assert not run.config.exists()


def test_rollouts_of_a_step(run: RunFolder) -> None:
    run.rollouts.mkdir()
    run.rollouts_of(7).write_text('{"step": 7, "response": "12"}\n', encoding="utf-8")
    assert read_rollouts(run.root, 7) == ({"step": 7, "response": "12"},)
    with pytest.raises(UserError, match=r"step_000008\.jsonl"):
        read_rollouts(run.root, 8)


def test_folders_of_other_kinds(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path)
    run.format.write_text(json.dumps({"format": FORMAT + 1}), encoding="utf-8")
    with pytest.raises(UserError, match=f"reads format {FORMAT}"):
        read_metrics(run.root)
    run.format.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"format\.json"):
        read_metrics(run.root)
    run.format.unlink()  # runs of before there was such a file
    assert len(read_metrics(run.root).steps) == 2


def test_complete_checkpoints_by_step(run: RunFolder) -> None:
    assert run.complete_checkpoints() == []
    for name in ("step_00000010", "step_00000009", "step_00000011.partial", "step_9", "other"):
        (run.checkpoints / name).mkdir(parents=True)
    assert [step_of(path) for path in run.complete_checkpoints()] == [9, 10]
    assert run.checkpoint_of(9) == run.complete_checkpoints()[0]
