"""Started by a test, or by hand: mutates inputs of copsd's commands and judges what becomes of them.

fuzz_worker.py FOLDER SEED FIRST COUNT runs the mutations FIRST, FIRST + 1, ... of a seed in FOLDER and prints
a line of JSON for each, then exits 0 whatever was found; so COUNT 1 runs one again. Each command runs in a process
forked from this one, which has imported everything: imports take longer than most of these commands.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import math
import os
import resource
import select
import shutil
import signal
import stat
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from fuzz_mutations import Mutation, mutate

# What a command spawns imports this file again: what takes long is imported where this process alone comes by.

PR_SET_CHILD_SUBREAPER = 36
CPU_SECONDS = 20.0
PATIENCE_MS = 120_000  # of the clock: only what waits for something that never comes takes so long
ORPHANS_S = 30.0  # for those that end by themselves once their parent has
MEMORY = 6 << 30  # further address space: what asks for more is refused by the system, not by the machine's end

COMMANDS: dict[str, tuple[str, ...]] = {
    "check": ("train", "in/config.yaml", "--check", "run.dir={world}/fresh", "run.steps=1"),
    "train": ("train", "in/config.yaml", "run.dir={world}/fresh", "run.steps=1"),
    "resume": ("train", "in/config.yaml", "run.dir={world}/run", "run.steps=3"),
    "translate": (
        "evaluate",
        "translation",
        "--hypotheses",
        "in/said.txt",
        "--references",
        "in/meant.tsv",
        "--out",
        "out.json",
    ),
    "evaluate": ("evaluate", "accuracy", "in/config.yaml", "--out", "out.json"),
    "export": ("export", "run", "--out", "out"),
    "export of step 1": ("export", "run", "--out", "out", "--step", "1"),
    "plan": ("plan", "in/config.yaml", "--gpus", "1", "--json"),
}
WRITES: dict[str, tuple[str, ...]] = {
    "check": (), "plan": (), "train": ("fresh",), "resume": ("run",), "evaluate": ("out.json",),
    "translate": ("out.json",), "export": ("out",), "export of step 1": ("out",),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        code: exit code; minus the signal that ended it.
        cpu: seconds of processor time, its own.
        late: whether it had to be killed.
        said: what it printed to standard error.
        result: what it computed, where it ended well.
        changed: what it changed, relative to the world.
    """

    code: int
    cpu: float
    late: bool
    said: str
    result: Any
    changed: tuple[str, ...]


def make_world(world: Path) -> None:
    """Make the inputs of all commands, and a run of two steps to continue and to export."""
    from tiny import make_model, settings, write_config, write_problems

    for name in ("in", "home", "tmp"):
        (world / name).mkdir(parents=True)
    make_model(world / "in" / "model")
    tree = settings(
        world / "in",
        world / "in" / "model",
        run={"dir": str(world / "run"), "steps": 2},
        rollout={"prompts_per_step": 2, "max_response_tokens": 3, "agreement_every": 1},
        checkpoint={"save_every": 1},
        eval={"max_response_tokens": 2},
    )
    write_problems(world / "in" / "problems.jsonl", 6)
    write_problems(world / "in" / "held_out.jsonl", 2)
    made_in = world / "in"
    held_out = {**tree["data"]["train"][0], "path": str(made_in / "held_out.jsonl")}
    tree["data"]["eval"] = [held_out, {**held_out, "path": str(made_in / "held_out.parquet"), "name": "parquet"}]
    tree["data"]["train"].append(write_tables(made_in))
    write_config(world / "in", tree)
    shard(world / "in" / "model", world / "in" / "sharded")
    made = run_command(world, ("train", "in/config.yaml"))
    assert made.code == 0, made.said


def write_tables(folder: Path) -> dict[str, str]:
    """Write problems in the other layouts and formats, and a translation to score; returns the source of the tables."""
    import pyarrow.json
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.json.read_json(folder / "held_out.jsonl"), folder / "held_out.parquet")
    pairs = [(2 + i, 3 + 2 * i) for i in range(4)]
    said = [f"Asha ana {a} na {b}." for a, b in pairs]
    meant = [f"Asha has {a} and {b}." for a, b in pairs]
    answers = [f"{a} + {b} = {a + b}. #### {a + b}" for a, b in pairs]
    for name, texts in (("sw.tsv", said), ("en.tsv", meant)):
        rows = [f"{text}\t{a + b}\n" for text, (a, b) in zip(texts, pairs, strict=True)]
        (folder / name).write_text("".join(rows), encoding="utf-8")
    rows = [json.dumps({"question": q, "answer": answer}) + "\n" for q, answer in zip(meant, answers, strict=True)]
    (folder / "solutions.jsonl").write_text("".join(rows), encoding="utf-8")
    (folder / "said.txt").write_text("\n".join(said) + "\n", encoding="utf-8")
    (folder / "meant.tsv").write_text(
        "".join(f"{q}\t{s}\n" for q, s in zip(meant, said, strict=True)), encoding="utf-8"
    )
    paths = {key: str(folder / name) for key, name in
             (("path", "sw.tsv"), ("english", "en.tsv"), ("solutions", "solutions.jsonl"))}  # fmt: skip
    return {**paths, "layout": "parallel", "language": "SWA"}


def shard(model: Path, out: Path) -> None:
    """Write a model again, its weights in two files behind an index."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(out, max_shard_size="30KB")
    for name in ("config.json", "generation_config.json"):
        shutil.copy(model / name, out / name)


def look(world: Path) -> dict[str, tuple[object, ...]]:
    """What is in a world, without following links."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, folders, files in os.walk(world):
        for name in (*folders, *files):
            path = Path(folder, name)
            about = path.lstat()
            is_folder = stat.S_ISDIR(about.st_mode)
            found[str(path.relative_to(world))] = (
                stat.S_IFMT(about.st_mode), *(() if is_folder else (about.st_size, about.st_mtime_ns))
            )  # fmt: skip
    return found


def run_command(world: Path, arguments: Sequence[str]) -> Outcome:
    """Run one command of copsd in a world, in a process of its own."""
    before = look(world)
    said, printed = (world.parent / name for name in ("stderr", "stdout"))
    process = os.fork()
    if process == 0:
        from copsd_tools import cli

        _begin(world, said, printed)
        sys.exit(cli.main(list(arguments)))  # an end like any other, with all that Python does at an end
    descriptor = os.pidfd_open(process)
    waiter = select.poll()
    waiter.register(descriptor, select.POLLIN)
    late = not waiter.poll(PATIENCE_MS)
    if late:
        os.killpg(process, signal.SIGKILL)
    _, status, usage = os.wait4(process, 0)
    os.close(descriptor)
    left = _orphans(process)
    after = look(world)
    changed = tuple(sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path)))
    return Outcome(
        code=os.waitstatus_to_exitcode(status),
        cpu=usage.ru_utime + usage.ru_stime,
        late=late,
        said=said.read_text(encoding="utf-8", errors="replace") + left,
        result=printed.read_text(encoding="utf-8", errors="replace"),
        changed=changed,
    )


def _orphans(group: int) -> str:
    """Wait for what a command started and did not wait for; this process inherits it. Kill what stays."""
    deadline = time.monotonic() + ORPHANS_S
    while True:
        try:
            ended, _ = os.waitpid(-group, os.WNOHANG)
        except ChildProcessError:
            return ""
        if ended == 0 and time.monotonic() > deadline:
            os.killpg(group, signal.SIGKILL)
            os.waitpid(-group, 0)
            return "\na process was left behind"
        time.sleep(0 if ended else 0.01)


def _begin(world: Path, said: Path, printed: Path) -> None:
    os.setsid()
    for path, descriptor in ((printed, 1), (said, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ |= {"HOME": str(world / "home"), "TMPDIR": str(world / "tmp")}
    os.chdir(world)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    soon = math.ceil(CPU_SECONDS)
    resource.setrlimit(resource.RLIMIT_CPU, (soon, soon + 5))


def computed(world: Path, command: str, printed: str) -> Any:
    """What an accepted command computed, to be compared bit for bit."""
    if command in ("train", "resume"):
        lines = (
            (world / WRITES[command][0] / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
        )
        steps = [line for line in map(_parsed, lines) if isinstance(line, dict) and "loss" in line]
        last = steps[-1] if steps else {}
        return {key: last.get(key) for key in ("step", "loss", "grad_norm", "num_loss_tokens", "response_tokens")}
    if command in ("evaluate", "translate"):
        return json.loads((world / "out.json").read_text(encoding="utf-8"))
    if command.startswith("export"):
        names = sorted(path.name for path in (world / "out").iterdir())
        return {name: hashlib.sha256((world / "out" / name).read_bytes()).hexdigest() for name in names}
    if command == "plan":
        return json.loads(printed)
    return None


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def judge(world: Path, mutation: Mutation, done: Outcome, wanted: dict[str, Any]) -> list[str]:
    """What is wrong with an outcome; empty for nothing."""
    wrong = []
    if done.late:
        wrong.append("hangs")
    if done.cpu > CPU_SECONDS or done.code == -signal.SIGXCPU:
        wrong.append(f"takes {done.cpu:.0f} s of processor time")
    # copsd plan says with 1 that a layout does not fit.
    allowed = {0, 1, 2} if mutation.command == "plan" and "error" not in done.said else {0, 2}
    if done.code not in allowed and not done.late:
        wrong.append(f"exit code {done.code}")
    if "Traceback (most recent call last)" in done.said:
        wrong.append("traceback")
    if "a process was left behind" in done.said:
        wrong.append("a process was left behind")
    may = WRITES[mutation.command] if done.code == 0 else ()
    outside = [path for path in done.changed if path.split("/")[0] not in may]
    if outside and not done.late:
        wrong.append(f"changed {', '.join(outside[:4])}")
    if done.code == 2 and not done.said.strip():
        wrong.append("refused without a word")
    if done.code == 0 and not wrong:
        wrong += meaning_changed(world, mutation, done, wanted)
    return wrong


def meaning_changed(world: Path, mutation: Mutation, done: Outcome, wanted: dict[str, Any]) -> list[str]:
    """How what an accepted command computed breaks the mutation's rule; empty for not at all."""
    found = computed(world, mutation.command, done.result)
    if mutation.command == "export" and found == wanted["export of step 1"] and "is damaged" in done.result + done.said:
        return []
    if mutation.meaning == "kept" and found != wanted[mutation.command]:
        return [f"accepted, and computes another thing: {found!r:.300} instead of {wanted[mutation.command]!r:.300}"]
    if mutation.meaning == "stated" and mutation.stated and mutation.command == "train":
        (place, value), used = mutation.stated, yaml.safe_load((world / "fresh" / "config.yaml").read_text("utf-8"))
        for key in place:
            used = used[key] if isinstance(used, list) or key in used else None
        same = used == value and isinstance(used, bool) == isinstance(value, bool)
        same = same or mutation.what.endswith(f"={used}")  # a setting that is text
        if not same and value is not None and value not in ([], {}):
            return [f"accepted, and {'.'.join(map(str, place))} is {used!r} instead of {value!r}"]
    if mutation.meaning == "transformers" and mutation.command == "train":
        lines = (world / "fresh" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        difference = json.loads(lines[0]).get("agreement/max_difference", math.nan)
        if not difference < 1e-3:
            return [f"accepted, and transformers' log-probabilities differ by {difference}"]
    return []


def arguments_of(world: Path, command: str, overrides: Sequence[str] = ()) -> list[str]:
    """The command line of a mutation; settings come before the options of a command."""
    whole = [part.format(world=world) for part in COMMANDS[command]]
    first = next((i for i, part in enumerate(whole) if part.startswith("--")), len(whole))
    # What a mutation states comes last, where it counts.
    return [*whole[:first], *overrides, *whole[first:]] if command != "check" else [*whole, *overrides]


def main() -> int:
    folder, seed, first, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    good, world = folder / "good", folder / "world"
    import commands_worker  # noqa: F401 what the commands need
    import pyarrow.parquet  # noqa: F401
    import sacrebleu  # noqa: F401

    from copsd_tools import plan  # noqa: F401

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    gc.freeze()
    # Made where it is used: configurations name their files with their whole paths.
    make_world(world)
    world.rename(good)
    wanted: dict[str, Any] = {}
    for command in COMMANDS:
        shutil.copytree(good, world)
        done = run_command(world, arguments_of(world, command))
        assert done.code == 0, f"{command}: {done.said}"
        wanted[command] = computed(world, command, done.result)
        assert not [path for path in done.changed if path.split("/")[0] not in WRITES[command]], done.changed
        shutil.rmtree(world)
    for number in range(first, first + count):
        shutil.copytree(good, world)
        mutation = mutate(f"{seed}:{number}", world)
        done = run_command(world, arguments_of(world, mutation.command, mutation.overrides))
        said = done.said.strip()
        report = {
            "number": number, "command": mutation.command, "what": mutation.what, "meaning": mutation.meaning,
            "code": done.code, "cpu": round(done.cpu, 2), "wrong": judge(world, mutation, done, wanted),
            "said": said if len(said) < 1500 else f"{said[:700]} ... {said[-700:]}",
        }  # fmt: skip
        print(json.dumps(report), flush=True)
        shutil.rmtree(world)
    return 0


if __name__ == "__main__":
    sys.exit(main())
