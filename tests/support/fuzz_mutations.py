"""What the fuzzer does to the inputs of a command: one mutation from one seed, and what may come of it."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from megatron_copsd.config.schema import Config

# What a mutation that is accepted, exit code 0, must leave as it is:
#   kept          everything that the command computes, bit for bit: nobody can have meant the change
#   stated        config.yaml of the run has the value that was given, for settings with another value of the right type
#   transformers  transformers computes the same from the mutated folder (``agreement/max_difference``)
#   free          nothing: another text, or another value that nothing can tell from a wrong one
Place = tuple[str | int, ...]
Meaning = Literal["kept", "stated", "transformers", "free"]


@dataclass(frozen=True)
class Mutation:
    """One change of a command's inputs, applied already.

    Attributes:
        command: which command is then run, a key of ``fuzz_worker.COMMANDS``.
        what: the change, in a line.
        overrides: settings to give on the command line besides.
        meaning: see above.
        stated: the setting's place and value, for ``stated``.
    """

    command: str
    what: str
    meaning: Meaning
    overrides: tuple[str, ...] = ()
    stated: tuple[Place, object] | None = None


# Structure: JSON and YAML trees

UNKNOWN = ("zzz", "Hidden_size", "", "ключ", "stepz")
EXTREMES = (0, -1, 3, 2**31, 10**18, 10**4000, 1e308, 1e-308, -0.0, math.nan, math.inf)
# Settings count what is then done: a large one is no mistake, but takes long.
SETTING_VALUES = (-1, 0, 1, 2, 2.5, 0.5, 1e-308, math.nan, math.inf)


def places(tree: Any, here: Place = ()) -> list[Place]:
    """Every place in a tree below its root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found: list[Place] = []
    for key, value in items:
        found += [(*here, key), *places(value, (*here, key))]
    return found


def retyped(value: object) -> list[object]:
    """What is of another type, and mistaken for the value most easily."""
    if isinstance(value, bool):
        return [str(value).lower(), int(value), [value], None, "no"]
    if isinstance(value, int | float):
        return [
            str(value),
            [value],
            {"value": value},
            None,
            True,
            value + 0.5 if isinstance(value, int) else f"{value}x",
        ]
    if isinstance(value, str):
        return [[value], {value: value}, None, 5, True, f"{value}\0"]
    return [None, str(value), 5, [], {}, [value], [[]]]


def edit_tree(
    rng: random.Random, tree: Any, extremes: tuple[object, ...]
) -> tuple[str, str, tuple[str | int, ...], Any]:
    """Change one place of a tree; returns how, a description, the place and the new value."""
    place = rng.choice(places(tree))
    parent = tree
    for key in place[:-1]:
        parent = parent[key]
    key, old = place[-1], parent[place[-1]]
    how = rng.choice(["drop", "rename", "unknown", "retype", "retype", "extreme", "extreme"])
    if isinstance(parent, list) and how in ("rename", "unknown"):
        how = "drop"
    if how == "extreme" and (isinstance(old, bool) or not isinstance(old, int | float)):
        how = "retype"
    new: Any = None
    if how == "drop":
        del parent[key]
    elif how == "rename":
        parent[rng.choice([f"{key}s", str(key).upper() + "_", f" {key}"])] = parent.pop(key)
    elif how == "unknown":
        new = rng.choice([1, "x", None, [], {}, True])
        parent[rng.choice(UNKNOWN)] = new
    else:
        new = rng.choice(retyped(old) if how == "retype" else extremes)
        parent[key] = new
    shown = repr(new) if len(repr(new)) < 60 else repr(new)[:57] + "..."
    return how, f"{how} {'.'.join(map(str, place))} ({old!r:.40} -> {shown})", place, new


# Bytes and files


def edit_bytes(rng: random.Random, path: Path, upto: int | None = None) -> str:
    """Change a file as a bad disk, a broken copy or an editor does."""
    data = path.read_bytes()
    size = max(1, min(len(data), upto or len(data)))
    at = rng.randrange(size)
    how = rng.choice(["drop a byte", "flip a bit", "cut", "insert a NUL", "insert 0xff", "add a BOM", "add a byte"])
    changed = {
        "drop a byte": data[:at] + data[at + 1 :],
        "flip a bit": data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :],
        "cut": data[:at],
        "insert a NUL": data[:at] + b"\0" + data[at:],
        "insert 0xff": data[:at] + b"\xff" + data[at:],
        "add a BOM": b"\xef\xbb\xbf" + data,
        "add a byte": data + b"x",
    }[how]
    path.write_bytes(changed)
    return f"{how} at {at} of {path.name}"


def replace_file(rng: random.Random, path: Path) -> str:
    """Put something else where a file was."""
    how = rng.choice(["missing", "empty", "a folder", "a link to itself", "a FIFO", "a link to nowhere"])
    path.unlink()
    if how == "empty":
        path.touch()
    elif how == "a folder":
        path.mkdir()
    elif how == "a link to itself":
        path.symlink_to(path.name)
    elif how == "a FIFO":
        os.mkfifo(path)
    elif how == "a link to nowhere":
        path.symlink_to("nowhere")
    return f"{path.name}: {how}"


def write_json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree), encoding="utf-8")


# One family of mutations each; all take a world that is theirs to spoil.


# Values as YAML 1.2 reads them; None for what it reads as text, or not at all.
YAML_TEXTS = (
    ("010", 10), ("0o10", 8), ("0x10", 16), ("+3", 3), ("&a 3", 3), ("1:30", None), ("1_000", None), ("yes", None),
    ("1e1", None), ("2026-01-01", None), ("*a", None), ("!x 3", None), ("${oops}", None), ("3\n  seed: 4", None),
)  # fmt: skip


def mutate_config(rng: random.Random, world: Path) -> Mutation:
    path = world / "in" / "config.yaml"
    command = rng.choice(["check", "train", "train", "evaluate", "plan"])
    kind = rng.choice(["tree", "tree", "tree", "bytes", "file", "text"])
    if kind == "file":
        return Mutation(command, replace_file(rng, path), "kept")
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    if kind == "bytes":
        what = edit_bytes(rng, path)
        try:
            same = yaml.safe_load(path.read_text(encoding="utf-8")) == before
        except (yaml.YAMLError, UnicodeDecodeError, ValueError):
            same = True
        return Mutation(command, what, "kept" if same else "free")
    if kind == "text":
        text, value = rng.choice(YAML_TEXTS)
        source = path.read_text(encoding="utf-8")
        assert source.count("seed: 3") == 1
        path.write_text(source.replace("seed: 3", f"seed: {text}"), encoding="utf-8")
        stated = (("run", "seed"), value)
        return Mutation(command, f"run.seed: {text!r}", "kept" if value is None else "stated", stated=stated)
    how, what, place, value = edit_tree(rng, before, SETTING_VALUES)
    path.write_text(yaml.safe_dump(before, sort_keys=False), encoding="utf-8")
    if how == "drop":
        return Mutation(command, what, "free")
    chosen = how == "extreme" or (how == "retype" and (value is None or value in ([], {})))
    return Mutation(command, what, "stated" if chosen else "kept", stated=(place, value))


BROKEN_OVERRIDES = (
    "", "=", "run.seed", "run.seed=", ".=1", "run..seed=1", "runn.seed=3", "run.seeds=3", "data.train[0].path=x",
    "data.train.5.path=x", "data.train.-1.path=x", "data.train=5", "run=3", "run.seed={}", "run.seed=[1]",
    "run.seed=1=2", "x" * 10_000, "run.seed=\0", "run.seed=٣", "run.seed=1e400", "run.seed=" + "9" * 5000,
    "run.seed=[[[[", "run.seed=!x 1", "run.seed=${x}", "--seed=3", "run.dir=/dev/null", "run.dir=/proc/x/y", "run.dir=",
    "model.path=nowhere", "model.path=/dev/null", "model.path=", "model.path=./nowhere", "data.train.0.path=/dev/zero",
    "data.train.0.path=.", "data.train.0.layout=tsv", "data.train.0.language=x", "model.dtype=float16",
    "rollout.temperature=0", "run.name=", "run.steps=0", "run.steps=2.0", "run.steps=true", "optimizer.lr=1e-3x",
    "optimizer.lr=nan",
)  # fmt: skip


def mutate_overrides(rng: random.Random, world: Path) -> Mutation:
    command = rng.choice(["check", "train", "train", "evaluate", "plan"])
    if rng.random() < 0.5:
        override = rng.choice(BROKEN_OVERRIDES)
        return Mutation(command, f"override {override[:60]!r}", "kept", (override,))
    section = rng.choice([name for name in Config.model_fields if name != "data"])
    fields = Config.model_fields[section].annotation.model_fields
    name = rng.choice([name for name in fields if (section, name) not in {("run", "dir"), ("rollout", "engine")}])
    words = [word for word in get_args(fields[name].annotation) if isinstance(word, str) and word != "sglang"]
    value = rng.choice([*SETTING_VALUES, *words, True, False, None, "zzz"])
    override = f"{section}.{name}={json.dumps(value) if not isinstance(value, str) else value}"
    return Mutation(command, f"override {override}", "stated", (override,), ((section, name), value))


def mutate_rows(rng: random.Random, world: Path) -> Mutation:
    path = world / "in" / rng.choice(["problems.jsonl", "problems.jsonl", "held_out.jsonl"])
    command = "evaluate" if path.name == "held_out.jsonl" else "train"
    kind = rng.choice(["tree", "tree", "tree", "bytes", "bytes", "file", "lines"])
    if kind == "file":
        return Mutation(command, replace_file(rng, path), "kept")
    if kind == "bytes":
        what = edit_bytes(rng, path)
        try:
            for line in path.read_bytes().decode("utf-8").splitlines():
                json.loads(line)
        except ValueError:
            return Mutation(command, what, "kept")
        return Mutation(command, what, "free")  # another text
    lines = path.read_text(encoding="utf-8").splitlines()
    number = rng.randrange(len(lines))
    meaning: Meaning = "kept"
    if kind == "lines":
        what = rng.choice(
            ["repeated", "blank line before", "swapped with text", "array", "number", "deep", "twice on it"]
        )
        line = lines[number]
        lines[number] = {
            "repeated": f"{line}\n{line}", "blank line before": f"\n{line}", "swapped with text": "problem",
            "array": f"[{line}]", "number": "9" * 5000, "deep": "[" * 100_000, "twice on it": f"{line} {line}",
        }[what]  # fmt: skip
        if what == "repeated":
            meaning = "free"  # a problem more is another data set, and is said
        what = f"line {number + 1}: {what}"
    else:
        row = json.loads(lines[number])
        if rng.random() < 0.3:
            key = rng.choice(sorted(row))
            row[key] = rng.choice(["", " ", "\0", "\ud800", "x" * 100_000, "NaN", "sw", "#### 5", "<|end|>", "\u202e"])
            what, meaning = f"line {number + 1}: {key} = {row[key][:20]!r}", "free"
        else:
            _, what, *_ = edit_tree(rng, row, EXTREMES)
            what = f"line {number + 1}: {what}"
        lines[number] = json.dumps(row)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Mutation(command, what, meaning)


def mutate_tables(rng: random.Random, world: Path) -> Mutation:
    commands = {"sw.tsv": "train", "en.tsv": "train", "solutions.jsonl": "train", "held_out.parquet": "evaluate",
                "said.txt": "translate", "meant.tsv": "translate"}  # fmt: skip
    path = world / "in" / rng.choice(sorted(commands))
    command = commands[path.name]
    kind = rng.choice(["bytes", "lines", "lines", "file"])
    if kind == "file":
        return Mutation(command, replace_file(rng, path), "kept")
    if kind == "bytes" or path.suffix == ".parquet":
        return Mutation(command, edit_bytes(rng, path), "free")  # another text
    lines = path.read_text(encoding="utf-8").splitlines()
    number = rng.randrange(len(lines))
    line = lines[number]
    # Files that are read side by side must not slip, and tables not gain or lose columns.
    instead = {
        "repeated": f"{line}\n{line}", "blank line before": f"\n{line}", "lost": None, "empty": "", "space": " ",
        "third column": f"{line}\tx", "no second column": line.split("\t")[0] if "\t" in line else "",
    }  # fmt: skip
    what = rng.choice(sorted(instead))
    lines[number] = instead[what]
    kept = "\n".join(text for text in lines if text is not None)
    path.write_text(f"{kept}\n", encoding="utf-8")
    # An empty translation is one, and counted as such.
    empty = path.name == "said.txt" and what in ("empty", "space", "no second column")
    return Mutation(command, f"{path.name}: line {number + 1}: {what}", "free" if empty else "kept")


def mutate_hf_config(rng: random.Random, world: Path) -> Mutation:
    path = world / "in" / "model" / "config.json"
    command = rng.choice(["check", "train", "train", "train", "evaluate", "plan"])
    kind = rng.choice(["tree", "tree", "tree", "tree", "bytes", "file"])
    if kind == "file":
        return Mutation(command, replace_file(rng, path), "kept")
    tree = json.loads(path.read_text(encoding="utf-8"))
    if kind == "bytes":
        what = edit_bytes(rng, path)
        try:
            same = json.loads(path.read_bytes().decode("utf-8")) == tree
        except ValueError:
            same = True
        return Mutation(command, what, "kept" if same else "transformers")
    how, what, _, value = edit_tree(rng, tree, EXTREMES)
    write_json(path, tree)
    chosen = how in ("drop", "extreme") or (how == "retype" and value is None)
    return Mutation(command, f"config.json: {what}", "transformers" if chosen else "kept")


def mutate_hf_files(rng: random.Random, world: Path) -> Mutation:
    folder = world / "in" / "model"
    name = rng.choice(["generation_config.json", "tokenizer_config.json", "tokenizer.json"])
    path, command = folder / name, rng.choice(["train", "train", "evaluate", "check"])
    kind = rng.choice(["tree", "tree", "tree", "bytes", "file"])
    if kind == "file":
        # All of them may be missing somewhere; what is then the end of a response, or a chat, is another matter.
        what = replace_file(rng, path)
        return Mutation(command, what, "free" if what.endswith(("missing", "nowhere")) else "kept")
    if kind == "bytes":
        return Mutation(command, edit_bytes(rng, path), "free")
    tree = json.loads(path.read_text(encoding="utf-8"))
    how, what, *_ = edit_tree(rng, tree, EXTREMES)
    write_json(path, tree)
    kept = name == "generation_config.json" and how in ("rename", "unknown")
    return Mutation(command, f"{name}: {what}", "kept" if kept else "free")


def mutate_weights(rng: random.Random, world: Path) -> Mutation:
    kind = rng.choice(["header", "header", "bytes", "file", "index", "index", "stray"])
    command = rng.choice(["train", "evaluate", "check"])
    if kind == "index":
        path = world / "in" / "sharded" / "model.safetensors.index.json"
        overrides = (f"model.path={world / 'in' / 'sharded'}",)
        if rng.random() < 0.3:
            return Mutation(command, rng.choice([edit_bytes, replace_file])(rng, path), "kept", overrides)
        tree = json.loads(path.read_text(encoding="utf-8"))
        _, what, *_ = edit_tree(rng, tree, EXTREMES)
        write_json(path, tree)
        return Mutation(command, f"index: {what}", "kept", overrides)
    path = world / "in" / "model" / "model.safetensors"
    if kind == "file":
        return Mutation(command, replace_file(rng, path), "kept")
    if kind == "stray":
        name = rng.choice(["model_backup.safetensors", "pytorch_model.bin", "consolidated.safetensors"])
        shutil.copy(path, path.with_name(name))
        return Mutation(command, f"stray {name}", "kept")
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    if kind == "bytes":
        return Mutation(command, edit_bytes(rng, path, upto=8 + length), "kept")
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + length])
    _, what, *_ = edit_tree(rng, header, EXTREMES)
    packed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + data[8 + length :])
    return Mutation(command, f"safetensors header: {what}", "kept")


def mutate_checkpoint(rng: random.Random, world: Path) -> Mutation:
    command = rng.choice(["resume", "export"])
    newest = max((world / "run" / "checkpoints").iterdir())
    path = rng.choice(sorted(file for file in newest.rglob("*") if file.is_file()))
    kind = rng.choice(["tree", "tree", "bytes", "bytes", "file"])
    where = f"{path.relative_to(newest)}: "
    if kind == "file":
        return Mutation(command, where + replace_file(rng, path), "kept")
    if kind == "tree" and path.suffix == ".json":
        tree = json.loads(path.read_text(encoding="utf-8"))
        _, what, *_ = edit_tree(rng, tree, EXTREMES)
        write_json(path, tree)
        return Mutation(command, where + what, "kept")
    return Mutation(command, where + edit_bytes(rng, path), "kept")


def mutate_run(rng: random.Random, world: Path) -> Mutation:
    command = rng.choice(["resume", "export"])
    run = world / "run"
    path = rng.choice([run / "config.yaml", run / "metrics.jsonl"])
    kind = rng.choice(["tree", "bytes", "file"])
    if kind == "tree" and path.name == "config.yaml":
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        how, what, *_ = edit_tree(rng, tree, SETTING_VALUES)
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        kept = command == "resume" or how in ("rename", "unknown")
        return Mutation(command, f"run/config.yaml: {what}", "kept" if kept else "free")
    edit = replace_file if kind == "file" else edit_bytes
    # A record of the past: its lines are no part of what a run goes on with.
    return Mutation(command, f"run: {edit(rng, path)}", "kept" if command == "resume" else "free")


FAMILIES: tuple[tuple[int, Callable[[random.Random, Path], Mutation]], ...] = (
    (4, mutate_config), (4, mutate_overrides), (4, mutate_rows), (3, mutate_tables), (5, mutate_hf_config),
    (3, mutate_hf_files), (4, mutate_weights), (5, mutate_checkpoint), (1, mutate_run),
)  # fmt: skip


def mutate(seed: str, world: Path) -> Mutation:
    """Apply the mutation of a seed to a world."""
    rng = random.Random(seed)
    weights, families = zip(*FAMILIES, strict=True)
    return rng.choices(families, weights)[0](rng, world)
