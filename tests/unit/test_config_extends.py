"""Configurations that extend others: what wins, what is refused, and where each value is said to come from."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from processes import ROOT

from megatron_copsd.config.check import check
from megatron_copsd.config.dump import annotate_config
from megatron_copsd.config.load import load_config
from megatron_copsd.errors import UserError

BASE = """
    model: {path: m}
    data:
      train:
        - {path: some/hub-set, layout: released, language: SWA}
    rollout:
      temperature: 0.7
      stop_token_ids: [5, 6, 7]
    loss:
      entry_clip: 0.05
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text).removeprefix("\n"), encoding="utf-8")
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base.yaml", BASE)


def child(base: Path, text: str, name: str = "child.yaml") -> Path:
    return write(base.with_name(name), "extends: base.yaml\n" + textwrap.dedent(text).removeprefix("\n"))


def test_mappings_merge_lists_and_nulls_replace(base: Path) -> None:
    config = load_config(child(base, "rollout: {top_k: 3, stop_token_ids: [9]}\nloss: {entry_clip: null}\n")).config
    assert (config.model.path, config.rollout.temperature, config.rollout.top_k) == ("m", 0.7, 3)
    assert config.rollout.stop_token_ids == (9,)
    assert config.loss.entry_clip is None


def test_files_of_a_list_apply_in_order_and_the_file_itself_last(base: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "run: {name: a, steps: 11, seed: 1}\noptimizer: {lr: 1e-3}\n")
    write(tmp_path / "b.yaml", "run: {name: b, steps: 12}\n")
    config = load_config(write(tmp_path / "c.yaml", "extends: [base.yaml, a.yaml, b.yaml]\nrun: {name: c}\n")).config
    assert (config.run.name, config.run.steps, config.run.seed, config.optimizer.lr) == ("c", 12, 1, 1e-3)


def test_names_start_at_the_folder_of_the_file(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "shared" / "middle.yaml", "extends: ../base.yaml\nrun: {steps: 7}\n")
    path = write(tmp_path / "mine" / "top.yaml", "extends: ../shared/middle.yaml\nrun: {name: top}\n")
    config = load_config(path).config
    assert (config.run.name, config.run.steps, config.rollout.temperature) == ("top", 7, 0.7)
    monkeypatch.chdir(tmp_path / "mine")
    assert load_config("top.yaml").config == config


def test_one_base_on_two_ways_is_no_cycle(base: Path, tmp_path: Path) -> None:
    child(base, "run: {steps: 7}\n", "a.yaml")
    child(base, "run: {seed: 8}\n", "b.yaml")
    config = load_config(write(tmp_path / "c.yaml", "extends: [a.yaml, b.yaml]\n")).config
    assert (config.run.steps, config.run.seed) == (7, 8)


def test_references_see_the_merged_settings(base: Path) -> None:
    path = child(base, "run: {name: '${model.path}-${rollout.top_k}'}\nrollout: {top_k: 4}\n")
    assert load_config(path).config.run.name == "m-4"


def test_overrides_reach_extended_values(base: Path) -> None:
    path = child(base, "run: {steps: 7}\n")
    config = load_config(path, ["data.train.0.count=5", "rollout.temperature=0.9", "run.steps=8"]).config
    assert (config.data.train[0].count, config.data.train[0].path) == (5, "some/hub-set")
    assert (config.rollout.temperature, config.run.steps) == (0.9, 8)


def test_a_base_may_be_incomplete_but_is_no_run(tmp_path: Path) -> None:
    path = write(tmp_path / "base.yaml", "run: {steps: 3}\n")
    with pytest.raises(UserError, match=r"model: is required.*\n.*data: is required"):
        load_config(path)


@pytest.mark.parametrize("name", [p.name for p in sorted((ROOT / "configs" / "base").glob("*.yaml"))])
def test_shipped_bases_are_no_runs(name: str) -> None:
    with pytest.raises(UserError, match=r"is required"):
        load_config(ROOT / "configs" / "base" / name)


def test_a_cycle_is_named(tmp_path: Path) -> None:
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    write(a, "run: {steps: 3}\nextends: b.yaml\n")
    write(tmp_path / "c.yaml", "run: {seed: 1}\n")
    write(b, "extends:\n  - c.yaml\n  - a.yaml\n")
    with pytest.raises(UserError) as error:
        load_config(a)
    assert str(error.value).startswith(f"{b}:3: extends.1: 'a.yaml': the files extend each other: {a} -> {b} -> {a}. ")


def test_a_file_that_extends_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "extends: ./../" + tmp_path.name + "/a.yaml\n")
    with pytest.raises(UserError, match=r"a\.yaml:1: extends: .*extend each other"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {}\nextends: none.yaml\n", r"child\.yaml:2: extends: '[^']*none\.yaml': no such file\. Names start at"),
        ("extends: .\n", r"child\.yaml:1: extends: '[^']*': is a folder"),
        ("extends: base.yaml/x.yaml\n", r"child\.yaml:1: extends: '[^']*x\.yaml': can't be read: Not a directory"),
        ("extends:\n  - base.yaml\n  - 3\n", r"child\.yaml:3: extends\.1: 3: is the name of a file, or a list"),
        ("extends: {file: base.yaml}\n", r"child\.yaml:1: extends: \{'file': 'base\.yaml'\}: is the name of a file"),
        ("extends:\n", r"child\.yaml:1: extends: None: is the name of a file"),
        ("extends: base.yaml\nextends: base.yaml\n", r"child\.yaml:2: 'extends': the key stands at line 1 already"),
        ("run:\n  extends: base.yaml\n", r"child\.yaml:2: run\.extends: unknown setting"),
        ("extends: broken.yaml\n", r"broken\.yaml:3: .*not YAML"),
        ("extends: list.yaml\n", r"list\.yaml:1: '- 1': a configuration is a mapping of sections"),
    ],
)
def test_what_can_not_be_extended(base: Path, text: str, message: str) -> None:
    write(base.with_name("broken.yaml"), "run:\n  steps: 3\n bad\n")
    write(base.with_name("list.yaml"), "- 1\n")
    with pytest.raises(UserError, match=message):
        load_config(write(base.with_name("child.yaml"), text))


def test_extends_is_no_override(base: Path) -> None:
    with pytest.raises(UserError, match=r"command line: 'extends=base\.yaml': a file says what it extends"):
        load_config(base, ["extends=base.yaml"])


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("run: {steps: 3}\n", ["run.steps=0"], r"^command line \(run\.steps=0\): run\.steps: 0"),
        ("rollout: {temperature: -1}\n", [], r"child\.yaml:2: rollout\.temperature: -1"),
        ("loss: {entry_clip: 0.1}\nlora: {alpha: 2}\n", [], r"child\.yaml:3: lora\.alpha: 2\.0: has no effect"),
        ("run: {steps: 3}\noptimizer: {warmup_steps: 3}\n", [], r"child\.yaml:3: optimizer\.warmup_steps: 3"),
        ("prompt: {template: plain}\n", ["rollout={temperature: 0}"], r"^command line .*: rollout\.temperature: 0"),
        ("run: {name: '${nothing}'}\n", [], r"child\.yaml:2: run\.name: .*key 'nothing' not found"),
        ("prompt: {template: chat}\n", ["model.dtype=float64"], r"^command line \(model\.dtype=float64\)"),
        ("data: {eval: []}\n", ["data.train.0.language=X"], r"^command line .*: data\.train\.0\.language: 'X'"),
    ],
)
def test_complaints_name_where_the_winning_value_stands(
    base: Path, text: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check(load_config(child(base, text), overrides))


def test_complaints_name_the_base_for_what_it_says(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", BASE.replace("SWA", "XX").replace("0.05", "0.05\n      jsd_weight: 0.3"))
    with pytest.raises(UserError) as error:
        check(load_config(child(base, "loss: {token_clip: 1.0}\n")))
    language, weight = str(error.value).splitlines()
    assert language.startswith(f"{base}:4: data.train.0.language: 'XX': unknown language")
    assert weight.startswith(f"{base}:10: loss.jsd_weight: 0.3: has no effect")


def test_complaints_about_a_replaced_list_do_not_name_the_base(base: Path) -> None:
    path = child(base, "rollout:\n  stop_token_ids:\n    - 1\n    - -2\n")
    with pytest.raises(UserError, match=rf"^{path}:5: rollout\.stop_token_ids\.1: -2"):
        load_config(path)
    with pytest.raises(UserError, match=r"^command line .*: rollout\.stop_token_ids\.1: -2"):
        load_config(base, ["rollout.stop_token_ids=[1,-2]"])


def test_annotated_configuration(base: Path) -> None:
    path = child(base, "run:\n  name: top\nrollout:\n  stop_token_ids:\n    - 9\nloss:\n  entry_clip:\n")
    loaded = load_config(path, ["rollout.temperature=0.9", "data.train.0.name=x"])
    lines = annotate_config(loaded).splitlines()
    for line in (
        f"  name: top  # {path}:3",
        "  steps: 100  # default",
        f"  path: m  # {base}:1",
        "  - name: x  # command line",
        f"    language: SWA  # {base}:4",
        "    split: train  # default",
        "  eval: []  # default",
        "  temperature: 0.9  # command line",
        "  stop_token_ids:",
        f"  - 9  # {path}:6",
        f"  entry_clip: null  # {path}:8",
    ):
        assert line in lines, "\n".join(lines)
    assert all("  # " in line for line in lines if not line.endswith(":")), "every value says where it is from"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_annotated_configuration_reads_back(path: Path, tmp_path: Path) -> None:
    loaded = load_config(path)
    (tmp_path / "again.yaml").write_text(annotate_config(loaded), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml").config == loaded.config


@pytest.mark.parametrize(
    "name",
    [
        "1e-5",
        "12",
        "010",
        "0o17",
        "1:30",
        "yes",
        "2020-01-01",
        ".5e1",
        "null",
        "a # b",
        "a: b",
        "two\nlines",
        "\x85",
        "a\u2028b \u2029",
        "\ufeffx",
        "x" * 300 + " " + "y" * 300,
        "Ώ",
        "'",
        '"',
        " ",
        "#",
        "${a}",
        r"\${a}",
        "$",
        "\\",
    ],
)
def test_annotated_text_reads_back(base: Path, tmp_path: Path, name: str) -> None:
    loaded = load_config(base, ["run.name=PLACEHOLDER"])
    run = loaded.config.run.model_copy(update={"name": name})
    odd = type(loaded)(loaded.config.model_copy(update={"run": run}), loaded.places)
    (tmp_path / "again.yaml").write_text(annotate_config(odd), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml").config == odd.config
