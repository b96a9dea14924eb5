"""``copsd demo-data``: the demonstration's problems, tokenizer and model folder.

One-step word problems with worked solutions, each in English and in Swahili. Held-out problems are chosen by a hash of
their English sentence, so that no language has seen them in training; the numbers they use all occur in training.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_copsd.errors import UserError, describe

EXAMPLES = """examples:
  copsd demo-data --out runs/demo/data
  copsd demo-data --out runs/demo/data --seed 1 --train 8000
"""

NAMES = ("Asha", "Juma", "Neema", "Baraka", "Zawadi", "Imani", "Rehema", "Musa")


@dataclass(frozen=True)
class Thing:
    """Something to count, with the words that agree with its Swahili noun class."""

    english: str
    swahili: str
    how_many: str
    remained: str


THINGS = (
    Thing("mangoes", "maembe", "mangapi", "yamebaki"),
    Thing("oranges", "machungwa", "mangapi", "yamebaki"),
    Thing("eggs", "mayai", "mangapi", "yamebaki"),
    Thing("books", "vitabu", "vingapi", "vimebaki"),
    Thing("cups", "vikombe", "vingapi", "vimebaki"),
    Thing("bananas", "ndizi", "ngapi", "zimebaki"),
    Thing("pens", "kalamu", "ngapi", "zimebaki"),
    Thing("bags", "mifuko", "mingapi", "imebaki"),
)


@dataclass(frozen=True)
class Template:
    """One kind of problem: its sentence in both languages, its operation, and the numbers it takes."""

    english: str
    swahili: str
    operator: str
    first: range
    second: range


_ADD = (range(2, 13), range(2, 13))
_SUBTRACT = (range(5, 16), range(2, 13))
_MULTIPLY = (range(2, 10), range(2, 10))
TEMPLATES = (
    Template(
        "{n} has {a} {t} and buys {b} more {t}. How many {t} does {n} have now?",
        "{n} ana {ts} {a} na ananunua {ts} {b} zaidi. Sasa {n} ana {ts} {q}?",
        "+", *_ADD,
    ),
    Template(
        "{n} collects {a} {t} in the morning and {b} {t} in the evening. How many {t} does {n} collect in all?",
        "{n} anakusanya {ts} {a} asubuhi na {ts} {b} jioni. {n} anakusanya {ts} {q} kwa jumla?",
        "+", *_ADD,
    ),
    Template(
        "{n} has {a} {t} and gives {b} {t} to {m}. How many {t} are left?",
        "{n} ana {ts} {a} na anampa {m} {ts} {b}. {ts} {q} {r}?",
        "-", *_SUBTRACT,
    ),
    Template(
        "{n} had {a} {t} but lost {b} of them. How many {t} does {n} still have?",
        "{n} alikuwa na {ts} {a} lakini akapoteza {ts} {b}. {n} bado ana {ts} {q}?",
        "-", *_SUBTRACT,
    ),
    Template(
        "There are {a} baskets with {b} {t} in each. How many {t} are there in all?",
        "Kuna vikapu {a}, na kila kikapu kina {ts} {b}. Kuna {ts} {q} kwa jumla?",
        "x", *_MULTIPLY,
    ),
    Template(
        "{n} buys {a} {t} every day for {b} days. How many {t} does {n} buy in all?",
        "{n} ananunua {ts} {a} kila siku kwa siku {b}. {n} ananunua {ts} {q} kwa jumla?",
        "x", *_MULTIPLY,
    ),
)  # fmt: skip

# One problem in this many is held out.
_HOLD_OUT = 8


@dataclass(frozen=True)
class WordProblem:
    """One problem in both languages with its worked solution."""

    english: str
    swahili: str
    solution: str
    answer: int

    @property
    def held_out(self) -> bool:
        """Whether no training stage may see it, decided by its English sentence alone."""
        digest = hashlib.blake2b(self.english.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % _HOLD_OUT == 0


def word_problems(seed: int) -> Iterator[WordProblem]:
    """Yield distinct problems without end but for the supply, in an order set by ``seed``."""
    random_source = random.Random(seed)
    seen: set[str] = set()
    supply = sum(len(t.first) * len(t.second) for t in TEMPLATES) * len(NAMES) * len(THINGS) // 2
    for _ in range(supply):
        template = random_source.choice(TEMPLATES)
        a, b = random_source.choice(template.first), random_source.choice(template.second)
        thing = random_source.choice(THINGS)
        name, other = random_source.sample(NAMES, 2)
        if template.operator == "-" and b >= a:
            continue
        problem = _fill(template, a, b, thing, name, other)
        if problem.english not in seen:
            seen.add(problem.english)
            yield problem


def _fill(template: Template, a: int, b: int, thing: Thing, name: str, other: str) -> WordProblem:
    answer = {"+": a + b, "-": a - b, "x": a * b}[template.operator]
    words = {
        "n": name, "m": other, "a": a, "b": b, "t": thing.english, "ts": thing.swahili, "q": thing.how_many,
        "r": thing.remained,
    }  # fmt: skip
    swahili = template.swahili.format(**words)
    for end in (". ", "? "):
        # A sentence that begins with the thing counted takes a capital.
        head, found, tail = swahili.partition(end)
        if found:
            swahili = head + found + tail[:1].upper() + tail[1:]
    solution = f"{a} {template.operator} {b} = {answer} #### {answer}"
    return WordProblem(template.english.format(**words), swahili, solution, answer)


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="copsd demo-data",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo/data"), help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="chooses the problems")
    parser.add_argument("--train", type=int, default=8000, help="training problems")
    parser.add_argument("--held-out", type=int, default=200, help="held-out problems of each language")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    train, held_out = _split(word_problems(args.seed), args.train, args.held_out)
    _write(args.out / "train_en.jsonl", train, "EN")
    _write(args.out / "train_sw.jsonl", train, "SWA")
    _write(args.out / "heldout_en.jsonl", held_out, "EN")
    _write(args.out / "heldout_sw.jsonl", held_out, "SWA")
    vocabulary = _write_model(args.out / "model", train)
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


def _write_model(folder: Path, problems: Iterable[WordProblem]) -> int:
    """Write a Qwen3 configuration of 1.6 M parameters and a word tokenizer; returns the vocabulary's size.

    Words keep the space before them and digits stand alone, so that decoding gives back the exact text and numbers are
    read as digits rather than memorised as words.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config

    from megatron_copsd.config.schema import PromptSettings
    from megatron_copsd.data.prompts import PromptBuilder
    from megatron_copsd.types import Problem

    split = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}|\n| ?[^\s\p{L}\p{N}]+"), "isolated")
    special = ("<pad>", "<eos>", "<unk>")

    def tokenizer_of(words: Iterable[str]) -> PreTrainedTokenizerFast:
        vocabulary = {word: i for i, word in enumerate((*special, *words))}
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        core.pre_tokenizer = split
        core.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
            clean_up_tokenization_spaces=False,
        )  # fmt: skip

    builder = PromptBuilder(tokenizer_of(()), PromptSettings(template="plain"))
    texts: set[str] = set()
    for problem, language in itertools.product(problems, ("EN", "SWA")):
        statement = problem.english if language == "EN" else problem.swahili
        full = Problem("demo", language, statement, problem.english, problem.solution, str(problem.answer))
        texts.update(word for text in builder.texts(full) for word, _ in split.pre_tokenize_str(text))
    texts.update(f"{space}{digit}" for space in ("", " ") for digit in range(10))
    tokenizer = tokenizer_of(sorted(texts))
    tokenizer.save_pretrained(folder)
    Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    ).save_pretrained(folder)
    return len(tokenizer)
