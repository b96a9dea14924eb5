"""The methods that the demonstration compares, each from the same model on as many tokens.

Methods that sample do so in 90 steps of 48 responses; a supervised method has as many draws a step as hold as many
tokens of responses on average, which its rows tell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from copsd_tools.command_line.arguments import override
from copsd_tools.demo.problems import DICTIONARY
from copsd_tools.demo.stages import CONFIGS, Folders, model_settings, processes, run_stage, source_paths
from megatron_copsd.records.disk import replace_text


@dataclass(frozen=True)
class Supervised:
    """A method that trains on rows made once, as settings of ``copsd sdrrl build``; docs/sdrrl.md has a table."""

    subsets: Sequence[str]
    own_share: float = 0.0
    code_switch: float = 0.0


@dataclass(frozen=True)
class Sampled:
    """A method that trains on the model's own responses, as changes to demo_copsd.yaml.

    Attributes:
        languages: of the problems, whose weights are the file's.
        settings: what else is set.
    """

    languages: Sequence[str] = ("sw", "en")
    settings: Sequence[str] = ()


METHODS: Mapping[str, Supervised | Sampled] = {
    "copsd": Sampled(),
    # Without translations there are English problems alone, which the teacher sees solved.
    "opsd": Sampled(("en",), ("objective.name=opsd",)),
    "sampled-token": Sampled(settings=("objective.name=sampled_token",)),
    # At COPSD's learning rate it loses what the model knew.
    "grpo": Sampled(
        settings=(
            "objective.name=grpo",
            "rollout.samples_per_prompt=8",
            "rollout.prompts_per_step=6",
            "optimizer.lr=1.0e-4",
        )
    ),
    "sft": Supervised(("LL",)),
    "t-sft": Supervised(("TT",)),
    "cit": Supervised(("LT",)),
    "xcot": Supervised(("LL", "TL"), code_switch=0.15),
    "sdrrl": Supervised(("LL", "TL", "LT", "TT", "mt", "comp"), own_share=0.5, code_switch=0.15),
}


def run_folder(folders: Folders, method: str) -> Path:
    """Return the folder of a method's run, apart from the stages': sft is a stage and a method."""
    return folders.out / "methods" / method


def run_method(method: str, folders: Folders, seed: int) -> None:
    """Train the demonstration's model by a method, unless that is done."""
    from megatron_copsd.sdrrl.build import ROWS

    run, recipe = run_folder(folders, method), METHODS[method]
    settings = model_settings(folders, run, folders.base, seed)
    config = CONFIGS / "demo_copsd.yaml"
    if isinstance(recipe, Sampled):
        settings += [*_problem_sources(folders, recipe.languages), *recipe.settings]
    else:
        config = CONFIGS / "demo_sdrrl.yaml"
        _write_materials(folders)
        rows = run.with_name(f"{method}_rows")
        settings += [override("data.train.0.path", str(rows / ROWS)), *_rows_settings(recipe, folders, rows)]
        run_stage(rows / "summary.json", ["sdrrl", "build", config, *settings, "rollout.prompts_per_step=1"])
        settings.append(f"rollout.prompts_per_step={_draws(folders, rows / ROWS, str(config), settings)}")
    # A run that is not finished goes on; one that is finished has its last evaluation.
    run_stage(run / "hf", ["train", config, *settings, *processes()], ["export", run, "--out", run / "hf"])


def _problem_sources(folders: Folders, languages: Sequence[str]) -> list[str]:
    """Return the settings of the sources of problems; one alone has no weight."""
    if len(languages) > 1:
        return source_paths(folders, "train", languages)
    (language,) = languages
    source = {"path": f"{folders.data}/train_{language}.jsonl", "layout": "released", "language": language.upper()}
    return [override("data.train", [source])]


def _rows_settings(recipe: Supervised, folders: Folders, rows: Path) -> list[str]:
    materials = _materials(folders)
    # Each file with whether the build has a use for it: one that has none is refused.
    files = {
        "sdrrl.translator.memories": ("translations.tsv", set(recipe.subsets) != {"LL"}),
        "sdrrl.dictionaries": ("dictionary.txt", recipe.code_switch > 0),
        "sdrrl.corpora": ("sentences.tsv", not {"mt", "comp"}.isdisjoint(recipe.subsets)),
    }
    return [
        override("sdrrl.dir", str(rows)),
        override("sdrrl.questions.path", str(materials / "questions.jsonl")),
        f"sdrrl.subsets=[{','.join(recipe.subsets)}]",
        f"sdrrl.own_share={recipe.own_share}",
        f"sdrrl.code_switch={recipe.code_switch}",
        *(
            override(f"{name}.0.path", str(materials / file)) if used else f"{name}=[]"
            for name, (file, used) in files.items()
        ),
    ]


def _materials(folders: Folders) -> Path:
    return folders.out / "supervised"


def _write_materials(folders: Folders) -> None:
    """Write what a build reads: the questions, their translations, sentences in both languages, and a dictionary."""
    rows = _lines(folders.data / "train_sw.jsonl")
    questions = [{"question": row["problem"], "answer": row["solution"]} for row in rows]
    pairs = [f"{row['problem']}\t{row['problem_translated']}" for row in rows]
    # Solutions are numbers and signs, the same in any language; x is a letter to a translator.
    solutions = sorted({row["solution"] for row in rows})
    files = {
        "questions.jsonl": [json.dumps(question) for question in questions],
        "translations.tsv": [*pairs, *(f"{solution}\t{solution}" for solution in solutions)],
        "sentences.tsv": pairs,
        "dictionary.txt": [f"{english} {swahili}" for english, swahili in DICTIONARY.items()],
    }
    _materials(folders).mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        replace_text(_materials(folders) / name, "".join(f"{line}\n" for line in lines))


def _draws(folders: Folders, rows: Path, config: str, settings: Sequence[str]) -> int:
    """Return how many draws a step hold as many tokens of responses as COPSD's step, going by both data's solutions."""
    from tokenizers import Tokenizer

    from megatron_copsd.config.load import load_config

    tokenizer = Tokenizer.from_file(str(folders.base / "tokenizer.json"))

    def tokens(solutions: Sequence[str]) -> int:
        return sum(len(tokenizer.encode(solution).ids) + 1 for solution in solutions)  # and the end of the sequence

    problems = [row["solution"] for row in _lines(folders.data / "train_sw.jsonl")]
    copsd = load_config(str(CONFIGS / "demo_copsd.yaml"), []).config
    steps = load_config(config, settings).config.run.steps
    wanted = copsd.run.steps * copsd.rollout.prompts_per_step * tokens(problems) / len(problems)
    made = _lines(rows)
    a_draw = tokens([row["solution"] for row in made]) / len({row["group"] for row in made})
    # Two replicas share a step.
    return max(2, 2 * round(wanted / steps / a_draw / 2))


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
