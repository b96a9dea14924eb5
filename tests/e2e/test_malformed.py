"""What a user can get wrong: one clear error with place, value, rule and remedy, exit code 2, no traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from layouts import selected
from processes import Command, copsd, copsd_each, train
from tiny import make_model, settings, write_config


@dataclass(frozen=True)
class Case:
    """One mistake: how the inputs are broken, how copsd is called, and what the error must name."""

    name: str
    names: tuple[str, ...]
    spoil: Callable[[Path, dict], None] = lambda folder, tree: None
    overrides: tuple[str, ...] = ()
    processes: int = 1
    check_only: bool = True


def edit_json(name: str, **changes: object) -> Callable[[Path, dict], None]:
    def spoil(folder: Path, tree: dict) -> None:
        path = folder / "model" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), encoding="utf-8")

    return spoil


def replace_line(number: int, text: str) -> Callable[[Path, dict], None]:
    def spoil(folder: Path, tree: dict) -> None:
        path = folder / "problems.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        lines[number - 1] = text
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    return spoil


def set_key(section: str, key: str, value: object) -> Callable[[Path, dict], None]:
    return lambda folder, tree: tree.setdefault(section, {}).update({key: value})


def truncate_weights(folder: Path, tree: dict) -> None:
    path = folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def remove(name: str) -> Callable[[Path, dict], None]:
    return lambda folder, tree: (folder / "model" / name).unlink()


def other_vocabulary(folder: Path, tree: dict) -> None:
    edit_json("config.json", vocab_size=500)(folder, tree)


GRPO = ("objective.name=grpo", "rollout.samples_per_prompt=2")


def row(**changes: object) -> str:
    """A row of the released layout in Swahili, with columns changed; those that are to be None are left out but one."""
    good = {"problem": "x", "solution": "y", "Answer": "1", "problem_translated": "z", "language_short": "sw"}
    return json.dumps({k: v for k, v in {**good, **changes}.items() if v is not None or k == "Answer"})


def held_out_without_answer(folder: Path, tree: dict) -> None:
    replace_line(5, row(Answer=None))(folder, tree)
    tree["data"]["eval"] = [{**tree["data"]["train"][0], "name": "held-out"}]


def template(text: str) -> Callable[[Path, dict], None]:
    return lambda folder, tree: (folder / "model" / "chat_template.jinja").write_text(text, encoding="utf-8")


CASES = [
    # Settings, each with the line it stands on.
    Case("unknown key", ("config.yaml:", "run.stepz", "Did you mean 'steps'?"), set_key("run", "stepz", 3)),
    Case("wrong type", ("config.yaml:", "run.steps", "'many'", "valid integer"), set_key("run", "steps", "many")),
    Case("out of range", ("config.yaml:", "rollout.temperature", "-1.0", "greater than 0"),
         set_key("rollout", "temperature", -1.0)),
    Case("unknown choice", ("config.yaml:", "loss.divergence", "'kl'", "'forward_kl'"),
         set_key("loss", "divergence", "kl")),
    Case("bad override", ("command line", "'optimizer.lr'", "section.key=value"), overrides=("optimizer.lr",)),
    Case("override of an unknown key", ("command line (optimizer.rate=1)", "unknown setting"),
         overrides=("optimizer.rate=1",)),
    Case("settings that contradict", ("config.yaml:", "optimizer.warmup_steps", "run.steps = 3"),
         set_key("optimizer", "warmup_steps", 9)),
    Case("setting without effect", ("loss.jsd_weight", "0.3", "loss.divergence = forward_kl", "Remove it"),
         set_key("loss", "jsd_weight", 0.3)),
    Case("unknown language", ("data.train.0.language", "'SWAHILLI'", "Did you mean SWA"),
         overrides=("data.train.0.language=SWAHILLI",)),
    Case("missing file", ("data.train.0.path", "'nowhere.jsonl'", "no such file"),
         overrides=("data.train.0.path=nowhere.jsonl",)),
    Case("world size", ("--nproc", "3", "multiple of parallel.tensor x parallel.context x parallel.pipeline = 2"),
         overrides=("parallel.tensor=2",), processes=3),
    Case("tensor parallel size", ("parallel.tensor", "4", "2 key-value groups", "Use one of 1, 2"),
         overrides=("parallel.tensor=4",), processes=4),
    Case("pipeline size", ("parallel.pipeline", "3", "2 layers", "Use one of 1, 2"),
         overrides=("parallel.pipeline=3",), processes=3),
    # The model folder.
    Case("unsupported family", ("model_type", "'gpt2'", "llama, qwen2, qwen3"),
         edit_json("config.json", model_type="gpt2")),
    Case("no model folder", ("model.path", "'nowhere'", "is no folder here", "Correct the path"),
         overrides=("model.path=nowhere",)),
    Case("truncated weights", ("model.safetensors", "not a complete safetensors file"), truncate_weights,
         check_only=False),
    Case("no safetensors", ("no .safetensors file",), remove("model.safetensors"), check_only=False),
    Case("weights of another size", ("embed_tokens", "has shape", "config.json"), other_vocabulary),
    # Rows of data, which --check reads, too.
    Case("broken JSON", ("problems.jsonl:3",), replace_line(3, '{"problem": ')),
    Case("missing column", ("problems.jsonl:1", "problem_translated"),
         replace_line(1, row(problem_translated=None))),
    Case("empty problem", ("problems.jsonl:1", "problem_translated"), replace_line(1, row(problem_translated=" "))),
    Case("overlong prompt", ("max_student_tokens",), overrides=("prompt.max_student_tokens=2",)),
    Case("no answer under grpo", ("problems.jsonl:5: None", "there is no answer", "data.ungradable"),
         replace_line(5, row(Answer=None)), overrides=GRPO),
    Case("an answer that stands for none", ("problems.jsonl:5: 'nan'", "stands for none", "data.ungradable"),
         replace_line(5, row(Answer="nan")), overrides=GRPO),
    Case("NaN for an answer", ("problems.jsonl:5", "NaN is no number"),
         replace_line(5, row(Answer="4").replace('"4"', "NaN")), overrides=GRPO),
    Case("no answer on a held-out row", ("problems.jsonl:5: None", "there is no answer", "data.ungradable"),
         held_out_without_answer),
    Case("a template without the message", ("prompt.template", "leaves the user's message out"),
         template("Hello"), overrides=("prompt.template=chat",)),
    Case("a broken template", ("prompt.template", "TemplateSyntaxError"), template("{% if %}"),
         overrides=("prompt.template=chat",)),
    # Methods.
    Case("samples ahead under grpo", ("command line", "rollout.ahead", "ratio", "Set 0"),
         overrides=(*GRPO, "rollout.engine=sglang", "rollout.ahead=1")),
    Case("cut samples under grpo", ("rollout.top_p", "rollout.top_k", "samples from a part of it"),
         overrides=(*GRPO, "rollout.top_p=0.9", "rollout.top_k=5")),
    Case("a teacher under sft", ("teacher.weights", "loss.entry_clip", "has no effect with objective.name = sft"),
         overrides=("objective.name=sft", "teacher.weights=live", "loss.entry_clip=0.1")),
    Case("beyond the vocabulary", ("loss.teacher_top_k", "1000000000", "the model's vocabulary has"),
         overrides=("loss.teacher_top_k=1000000000",)),
]  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("good")
    model = make_model(folder / "model")
    return folder, settings(folder, model)


def assert_user_error(done, names: tuple[str, ...]) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    for name in names:
        assert name in done.stderr, f"{name!r} is not in:\n{done.stderr}"


@pytest.fixture(scope="module")
def answers(
    request: pytest.FixtureRequest, good: tuple[Path, dict], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, subprocess.CompletedProcess[str]]:
    """What copsd says to each mistake, by the case's name."""
    folder = tmp_path_factory.mktemp("mistakes")
    commands = {}
    for number, case in enumerate(selected(request)):
        own = folder / str(number)
        shutil.copytree(good[0], own)
        tree = json.loads(json.dumps(good[1]).replace(str(good[0]), str(own)))
        case.spoil(own, tree)
        options = ["--nproc", case.processes] if case.processes > 1 else []
        options += ["--check"] if case.check_only else []
        commands[case.name] = Command(("train", write_config(own, tree), *case.overrides, *options))
    return dict(zip(commands, copsd_each([*commands.values()], folder / "said"), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_mistake(answers: dict[str, subprocess.CompletedProcess[str]], case: Case) -> None:
    assert_user_error(answers[case.name], case.names)


def test_all_mistakes_at_once(good: tuple[Path, dict], tmp_path: Path) -> None:
    tree = json.loads(json.dumps(good[1]))
    tree["run"]["stepz"] = 1
    tree["loss"] = {"entry_clip": -1}
    done = copsd("train", write_config(tmp_path, tree), "optimizer.lr=fast", "--check")
    assert_user_error(done, ("run.stepz", "loss.entry_clip", "optimizer.lr", "command line"))


def test_broken_yaml_and_duplicate_key(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("run:\n  steps: 3\n bad\n", encoding="utf-8")
    assert_user_error(copsd("train", tmp_path / "a.yaml"), ("a.yaml:3", "not YAML"))
    (tmp_path / "b.yaml").write_text("run:\n  steps: 3\n  steps: 4\n", encoding="utf-8")
    assert_user_error(copsd("train", tmp_path / "b.yaml"), ("b.yaml:3", "run.steps", "line 2 already"))


def test_damaged_checkpoints(good: tuple[Path, dict], tmp_path: Path) -> None:
    config = write_config(tmp_path, good[1])
    whole, halved, unlabelled = (tmp_path / name for name in ("whole", "halved", "unlabelled"))
    train(config, f"run.dir={whole}", "run.steps=1")
    checkpoint = Path("checkpoints") / "step_00000001"
    for run in (halved, unlabelled):
        shutil.copytree(whole, run)
    data = next((halved / checkpoint).glob("*.distcp"))
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    (unlabelled / checkpoint / "metadata.json").unlink()
    out = tmp_path / "hf"
    damaged = ("step_00000001", "is damaged", "Restore a checkpoint")
    expected = {
        Command(("train", config, f"run.dir={halved}")): (*damaged, "bytes instead of"),
        Command(("export", halved, "--out", out)): damaged,
        Command(("train", config, f"run.dir={unlabelled}")): (*damaged, "metadata.json is missing"),
        Command(("export", unlabelled, "--step", 7, "--out", out)): ("--step", "7", "There are: 1"),
    }
    for done, names in zip(copsd_each([*expected], tmp_path / "said"), expected.values(), strict=True):
        assert_user_error(done, names)
    assert not out.exists()


def test_what_one_rank_can_not_write_is_said_once_and_ends_the_others(good: tuple[Path, dict], tmp_path: Path) -> None:
    config = write_config(tmp_path, good[1])
    run = tmp_path / "run"
    (run / "rollouts" / "step_000001.jsonl").mkdir(parents=True)  # a folder where the main process wants a file
    done = copsd("train", config, f"run.dir={run}", processes=2)
    assert done.returncode == 2
    assert done.stderr.count("Is a directory") == 1
    assert f"error:\n{run / 'rollouts' / 'step_000001.jsonl'}" in done.stderr
    assert "Traceback" not in done.stderr
