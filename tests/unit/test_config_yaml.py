"""The YAML of configurations and overrides: what words mean, and that what is wrong is told with its place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_copsd.config.load import load_config
from megatron_copsd.config.reading.document import read_document
from megatron_copsd.errors import UserError

BASE = """\
model: {path: m}
data:
  train:
    - {path: some/hub-set, layout: released, language: SWA}
"""
NESTED = "[" * 5000
# Ten aliases to each list of ten: a hundred million values in eight lines.
BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefg", "bcdefgh", strict=True)
)  # fmt: skip
REFERENCES = "a: xxxxxxxxxx\n" + "".join(
    f"{name}: '{'${' + before + '}'}{'${' + before + '}'}'\n"
    for before, name in zip("abcdefghijklmnopqrstuvw", "bcdefghijklmnopqrstuvwx", strict=True)
)
CHAIN = "a0: x\n" + "".join(f"a{n}: '${{a{n - 1}}}'\n" for n in reversed(range(1, 2000)))


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("010", 10), ("-010", -10), ("+7", 7), ("0o10", 8), ("0x1F", 31), ("0b11", "0b11"), ("1_000", "1_000"),
        ("1:30", "1:30"), ("1e-5", 1e-5), ("+12E03", 12e3), (".5", 0.5), ("5.", 5.0), (".inf", float("inf")),
        ("-.INF", float("-inf")), ("inf", "inf"), ("yes", "yes"), ("on", "on"), ("y", "y"), ("off", "off"),
        ("No", "No"),
        ("true", True), ("FALSE", False), ("tRue", "tRue"), ("~", None), ("NULL", None), ("", None), ("nil", "nil"),
        ("2020-01-01", "2020-01-01"), ("12:30:45", "12:30:45"), ("'3'", "3"), ("!!str 3", "3"), ("!!float 3", 3.0),
        ("=", "="), ("9223372036854775807", 2**63 - 1),
    ],
)  # fmt: skip
def test_words_of_the_core_schema(word: str, value: object) -> None:
    found = read_document(f"a: {word}\n", str).value["a"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {steps: 3,\n  steps: 4}\n", r"c\.yaml:6: 'run\.steps': the key stands at line 5 already"),
        ("run:\n  name: a\0b\n", r"c\.yaml:6: '\\x00': not YAML: a control character"),
        ('run:\n  name: "a\\0b"\n', r"c\.yaml:6: 'a\\x00b': has a zero byte"),
        ('run:\n  name: "\\ud800"\n', r"c\.yaml:6: '\\ud800': has .* half a surrogate pair"),
        ("run:\n  steps: !foo 3\n", r"c\.yaml:6: '!foo': an unknown tag at run\.steps"),
        ("run:\n  steps: !!python/name:os.system\n", r"c\.yaml:6: '!!python/name:os\.system': an unknown tag"),
        ("run:\n  steps: !!binary aGk=\n", r"c\.yaml:6: '!!binary': an unknown tag"),
        ("run:\n  steps: !!int x\n", r"c\.yaml:6: 'x': is no int, as its tag says"),
        ("run: !!set {a, b}\n", r"c\.yaml:5: '!!set': an unknown tag"),
        (BOMB, r"c\.yaml:\d+: '[a-h.0-9]+': more than 10,000 values, each alias"),
        ("run:\n  name: &x [*x]\n", r"c\.yaml:6: 'run\.name\.0': an alias \(\*name\) to what it stands in"),
        ("run: *nobody\n", r"c\.yaml:5: .*undefined alias 'nobody'"),
        ("run: {null: 3}\n", r"c\.yaml:5: 'null': is no name of a setting in run"),
        ("? [a, b]\n: 3\n", r"c\.yaml:5: 'a list or mapping': is no name of a setting"),
        ("7: 3\n", r"c\.yaml:5: '7': is no name of a setting"),
        ("run: {<<: {steps: 3}}\n", r"c\.yaml:5: run\.<<: unknown setting"),
        (f"run: {NESTED}\n", r"c\.yaml:5: .*more than 20 deep"),
        (f"run: {{seed: {'1' * 5000}}}\n", r"c\.yaml:5: '1{80}\.\.\.': a whole number of more than 64 bits"),
        (f"run: {{seed: -{2**63 + 1}}}\n", r"c\.yaml:5: '-9223372036854775809': a whole number of more"),
        ("run: {name: '${'}\n", r"c\.yaml:5: run\.name: '\$\{': the reference can't be followed"),
        ("run: {name: '${run.dir}', dir: '${run.name}'}\n", r"c\.yaml:5: run\.\w+: .*Recursive"),
        (REFERENCES, r"c\.yaml:\d+: \w+: '\$\{\w\}\$\{\w\}.*': has more than 100,000 characters, references"),
        (CHAIN, r"c\.yaml:\d+: \w+: .*(leads from reference to reference|has more than 100,000)"),
        ("---\na: 1\n", r"c\.yaml:5: '---': not YAML: but found another document"),
        ("run: 3\n", r"c\.yaml:5: run: 3: must be a section"),
        ("run: {name: 3}\n", r"c\.yaml:5: run\.name: 3: must be a text"),
        ("rollout: {stop_token_ids: 3}\n", r"c\.yaml:5: rollout\.stop_token_ids: 3: must be a list"),
        ("optimizer: {lr: 1e400}\n", r"c\.yaml:5: optimizer\.lr: inf: input should be a finite number"),
    ],
)  # fmt: skip
def test_what_a_file_can_not_say(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(BASE + text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runn.steps=3", r"^command line \(runn\.steps=3\): runn: unknown setting\. Did you mean 'run'\?"),
        ("runn.a.b=3", r"^command line \(runn\.a\.b=3\): runn: unknown setting"),
        ("data.train[0].path=", r"^command line: 'data\.train\[0\]\.path=': an item .* For example: data\.train\.0\."),
        ("data.train.1.path=x", r"^command line: .*: data\.train is a list of 1,"),
        ("data.train.x.path=y", r"^command line: .*: data\.train is a list"),
        ("run.0=3", r"^command line: 'run\.0=3': run is a section"),
        ("model.path.x=3", r"^command line: .*: model\.path is 'm'"),
        (f"{'a.' * 3000}b=3", r"^command line: .*: an override is section\.key=value"),
        ("run.steps=[", r"^command line \(run\.steps=\[\): '\[': not YAML"),
        ("run.steps=@3", r"^command line \(run\.steps=@3\): '@3': not YAML"),
        ("run.steps=*a", r"^command line \(run\.steps=\*a\): .*undefined alias"),
        (f"run.name={NESTED}", r"^command line \(run\.name=.*more than 20 deep"),
        ("run={steps: 1, steps: 2}", r"^command line \(.*\): 'steps': the key stands at line 1 already"),
        ("run.dir=", r"^command line \(run\.dir=\): run\.dir: None: must be a text"),
        ("run.name=${", r"^command line \(run\.name=\$\{\): run\.name: '\$\{': the reference"),
        ("run.steps=1:30", r"^command line .*: run\.steps: '1:30': input should be a valid integer"),
    ],
)  # fmt: skip
def test_what_an_override_can_not_say(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(BASE, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_config(path, [override])


def test_overrides_are_read_as_files_are(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(BASE, encoding="utf-8")
    config = load_config(path, ["run.steps=010", "run.name=yes", "optimizer.lr=1e-5", "run.seed=0o17"]).config
    assert (config.run.steps, config.run.name, config.optimizer.lr, config.run.seed) == (10, "yes", 1e-5, 15)


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes("run:\n  name: é\n".encode("latin-1"))
    (tmp_path / "large.yaml").write_bytes(b"#" * (1 << 21))
    for name, says in {
        "pipe.yaml": "is no regular file",
        "folder.yaml": "is a folder",
        "latin.yaml": r"latin\.yaml:2: b'\\xe9': the file is not UTF-8",
        "large.yaml": "has more than 1,048,576 bytes",
        "x" * 300: "can't be read: File name too long",
        "/dev/null": "is no regular file",
    }.items():
        with pytest.raises(UserError, match=says):
            load_config(tmp_path / name)


def test_a_file_that_many_ways_lead_to_is_read_once(tmp_path: Path) -> None:
    """Two ways at each of forty files would be more than a lifetime of reading."""
    (tmp_path / "0.yaml").write_text(BASE, encoding="utf-8")
    for number in range(1, 40):
        (tmp_path / f"{number}.yaml").write_text(f"extends: [{number - 1}.yaml, {number - 1}.yaml]\n")
    assert load_config(tmp_path / "39.yaml").config.model.path == "m"
