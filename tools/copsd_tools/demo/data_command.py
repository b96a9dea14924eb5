"""``copsd demo-data``: the demonstration's problems, tokenizer and model folder.

One-step word problems with worked solutions, each in English and in Swahili. Held-out problems are chosen by a hash of
their English sentence, so that no language has seen them in training; the numbers they use all occur in training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from copsd_tools.command_line.arguments import new_parser, path, positive, whole
from copsd_tools.command_line.outputs import check_file_and_parents, check_folder
from copsd_tools.demo.problems import WordProblem, word_problems
from megatron_copsd.errors import UserError, describe

EXAMPLES = """examples:
  copsd demo-data --out runs/demo/data
  copsd demo-data --out runs/demo/data --seed 1 --train 8000
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = new_parser("demo-data", __doc__, EXAMPLES)
    parser.add_argument("--out", type=path, default=Path("runs/demo/data"), help="folder to make")
    parser.add_argument("--seed", type=whole, default=0, help="chooses the problems")
    parser.add_argument("--train", type=positive, default=8000, help="training problems")
    parser.add_argument("--held-out", type=positive, default=200, help="held-out problems of each language")
    args = parser.parse_args(argv)

    for folder in (args.out, args.out / "model"):
        check_folder(folder, "--out")
    train, held_out = _split(word_problems(args.seed), args.train, args.held_out)
    files = {
        args.out / "train_en.jsonl": (train, "EN"),
        args.out / "train_sw.jsonl": (train, "SWA"),
        args.out / "heldout_en.jsonl": (held_out, "EN"),
        args.out / "heldout_sw.jsonl": (held_out, "SWA"),
    }
    for file in files:
        check_file_and_parents(file, "--out")

    from copsd_tools.demo.model_folder import write_model

    args.out.mkdir(parents=True, exist_ok=True)
    for file, (problems, language) in files.items():
        _write(file, problems, language)
    vocabulary = write_model(args.out / "model", train)
    print(f"{args.out}: {len(train)} training and {len(held_out)} held-out problems, {vocabulary} words")
    return 0


def _split(problems: Iterable[WordProblem], train: int, held_out: int) -> tuple[list[WordProblem], list[WordProblem]]:
    chosen: dict[bool, list[WordProblem]] = {False: [], True: []}
    wanted = {False: train, True: held_out}
    for problem in problems:
        part = chosen[problem.held_out]
        if len(part) < wanted[problem.held_out]:
            part.append(problem)
        if all(len(chosen[key]) == wanted[key] for key in wanted):
            return chosen[False], chosen[True]
    rule = f"the templates make only {len(chosen[False])} training and {len(chosen[True])} held-out problems"
    raise UserError(describe("--train, --held-out", (train, held_out), rule, "Ask for fewer."))


def _write(path: Path, problems: Iterable[WordProblem], language: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        for problem in problems:
            row = {
                "source": "demo",
                "problem": problem.english,
                "solution": problem.solution,
                "Answer": str(problem.answer),
                "problem_translated": problem.english if language == "EN" else problem.swahili,
                "language": language,
                "language_short": language.lower()[:2],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
