"""What SDRRL's data are made of: templates, dictionaries, filters, and rows with where they are from."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_copsd.config.sections.sdrrl import (
    CorpusSettings,
    IdentifierSettings,
    QualitySettings,
    QuestionSettings,
    SdrrlSettings,
)
from megatron_copsd.errors import UserError
from megatron_copsd.languages import Language, language
from megatron_copsd.languages.african import AFRICAN
from megatron_copsd.sdrrl.build import Build, Workers, begin
from megatron_copsd.sdrrl.chance import choose, uniform
from megatron_copsd.sdrrl.filters import load_estimator, load_identifier, require_covered
from megatron_copsd.sdrrl.journal import Journal
from megatron_copsd.sdrrl.respond import Answer
from megatron_copsd.sdrrl.sources import Question, SentencePair, read_corpus, read_questions
from megatron_copsd.sdrrl.switching import read_dictionary
from megatron_copsd.sdrrl.templates import completion_question, translation_question

EN, SWA, YOR = language("EN"), language("SWA"), language("YOR")
GATITOS = "mango\tembe\nmango\tdodo\nhas\tana\nhow many\tngapi\nbuys\tananunua [verb]\nto\t-ku\nfour\tnne\n"


@pytest.fixture
def gatitos(tmp_path: Path) -> str:
    path = tmp_path / "en_sw.tsv"
    path.write_text(GATITOS, encoding="utf-8")
    return str(path)


def test_table_1() -> None:
    assert translation_question("How are you?", EN, SWA) == (
        "Question: Translate the following sentence from English to Swahili.\nHow are you?\nAnswer:"
    )
    sentence = "Habari ya asubuhi rafiki yangu"
    cuts = {completion_question(sentence, SWA, seed) for seed in range(60)}
    head = "Question: Complete the following sentence in Swahili according to its context.\n"
    words = sentence.split()
    assert cuts == {f"{head}{' '.join(words[:n])}\nAnswer:" for n in range(1, len(words))}
    assert completion_question("Habari", SWA, 1) in {f"{head}{'Habari'[:n]}\nAnswer:" for n in range(1, 6)}
    assert completion_question("H", SWA, 1) is None


def test_chances_are_functions_of_their_names() -> None:
    numbers = [uniform(7, "own", n) for n in range(10_000)]
    assert numbers == [uniform(7, "own", n) for n in range(10_000)]
    assert min(numbers) >= 0
    assert max(numbers) < 1
    assert abs(sum(numbers) / len(numbers) - 0.5) < 4 * math.sqrt(1 / 12 / len(numbers))
    assert uniform("ab", "c") != uniform("a", "bc")
    assert {choose("xyz", seed) for seed in range(50)} == set("xyz")


def test_a_dictionary_and_its_inverse(gatitos: str) -> None:
    out, back = read_dictionary(gatitos, "gatitos")
    assert out.words == {"mango": ("embe", "dodo"), "has": ("ana",), "buys": ("ananunua",), "four": ("nne",)}
    # Several words are found on neither side that is looked up; parts of words on none.
    assert back.words["ngapi"] == ("how many",)
    assert "-ku" not in back.words
    assert out.switched("Asha has a Mango.", 1.0, 0)[0] in ("Asha ana a Embe.", "Asha ana a Dodo.")
    assert back.switched("Ana ngapi?", 1.0, 0)[0] == "Has how many?"
    text, switches = out.switched("Asha has four mangoes, Asha has one.", 1.0, 0)
    assert text == "Asha ana nne mangoes, Asha ana one."
    assert switches == ((1, "has", "ana"), (2, "four", "nne"), (5, "has", "ana"))


def test_rate_of_switching(gatitos: str) -> None:
    """Of the words that are in the dictionary, 0.15 are replaced: within four standard deviations."""
    out, _ = read_dictionary(gatitos, "gatitos")
    texts = [f"{n} has four mango and buys one" for n in range(2000)]
    could = sum(len(out.switched(text, 1.0, n)[1]) for n, text in enumerate(texts))
    done = sum(len(out.switched(text, 0.15, 3, n)[1]) for n, text in enumerate(texts))
    assert could == 8000
    assert abs(done - 0.15 * could) < 4 * math.sqrt(could * 0.15 * 0.85)
    assert all(out.switched(text, 0.0, n) == (text, ()) for n, text in enumerate(texts))


@pytest.mark.parametrize(
    ("content", "form", "parts"),
    [
        ("mango\n", "gatitos", (":1", "two columns parted by a tab")),
        ("a\tb\na\tb\tc\n", "gatitos", (":2", "two columns")),
        ("mango embe\nmango\tembe dodo\n", "muse", (":2", "two columns parted by space")),
        ("mango\t \n", "gatitos", (":1", "two columns")),
        ("", "gatitos", ("no word is left",)),
        ("two words\tmaneno mawili\n", "gatitos", ("no word is left",)),
        (b"\xff\tx\n", "gatitos", ("not UTF-8",)),
    ],
)
def test_malformed_dictionaries(tmp_path: Path, content: str | bytes, form: Any, parts: tuple[str, ...]) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=".*".join(["words.txt", *map(re.escape, parts)])):
        read_dictionary(str(path), form)


def test_questions(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(
        json.dumps({"question": "48/2?", "answer": "It is 48/2 = <<48/2=24>>24\n#### 24"}) + "\n", encoding="utf-8"
    )
    (found,) = read_questions(QuestionSettings(path=str(path), layout="gsm8k"))
    assert (found.key, found.problem, found.response) == ("train.jsonl:1", "48/2?", "It is 48/2 = 24\n#### 24")
    path.write_text(
        "".join(json.dumps({"instruction": "Add.", "input": given, "output": "3"}) + "\n" for given in ("1, 2", "")),
        encoding="utf-8",
    )
    both = read_questions(QuestionSettings(path=str(path), layout="alpaca"))
    assert [question.problem for question in both] == ["Add.\n1, 2", "Add."]
    with pytest.raises(UserError, match=r"sdrrl\.questions\.count: 3: .* has 2 rows"):
        read_questions(QuestionSettings(path=str(path), layout="alpaca", count=3))
    with pytest.raises(UserError, match=r"train\.jsonl:1: 'answer': the row lacks"):
        read_questions(QuestionSettings(path=str(path), layout="gsm8k"))


def test_malformed_corpora(tmp_path: Path) -> None:
    path = tmp_path / "corpus.tsv"
    path.write_text("Hello\tHabari\nHello\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"corpus\.tsv:2"):
        read_corpus(CorpusSettings(language="SWA", path=str(path), count=1), "sdrrl.corpora.0")
    path.write_text("Hello\tHabari\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"sdrrl\.corpora\.0\.count: 1000"):
        read_corpus(CorpusSettings(language="SWA", path=str(path)), "sdrrl.corpora.0")


def test_filters_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_identifier(IdentifierSettings(name="off")) is None
    assert load_estimator(QualitySettings(name="off"), "cpu") is None
    for module in ("comet", "heliport", "fasttext"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UserError, match=r"unbabel-comet is not installed.*sdrrl\.quality\.name: off"):
        load_estimator(QualitySettings(path=str(tmp_path)), "cpu")
    with pytest.raises(UserError, match=r"heliport is not installed.*sdrrl\.identifier\.name: off"):
        load_identifier(IdentifierSettings(name="heliport"))
    with pytest.raises(UserError, match="fasttext-predict is not installed"):
        load_identifier(IdentifierSettings(name="fasttext", path="model.bin"))


def test_languages_of_the_identifier() -> None:
    lingua = load_identifier(IdentifierSettings())
    assert lingua is not None
    require_covered(lingua, "lingua", [SWA, YOR])
    with pytest.raises(UserError, match=r"sdrrl\.identifier\.name: 'lingua': it does not know HAU, LIN"):
        require_covered(lingua, "lingua", [SWA, language("HAU"), language("LIN")])
    assert lingua.identify("Juma ana maembe kumi na nane na ananunua matano zaidi.") == "SWA"
    assert lingua.identify("Juma has eighteen mangoes and buys five more.") == "EN"
    cld3 = load_identifier(IdentifierSettings(name="cld3"))
    assert cld3 is not None
    with pytest.raises(UserError, match=r"sdrrl\.identifier\.name: 'cld3': it does not know LIN"):
        require_covered(cld3, "cld3", [SWA, language("HAU"), language("LIN")])
    # Its own codes are found under ours, and those of others are told from them.
    known = [one for one in AFRICAN if cld3.covers(one)]
    assert {one.code for one in known if cld3.identify(one.instruction) == one.code} >= {"AMH", "HAU", "IBO", "ZUL"}
    assert cld3.identify("18 + 4 = 22") != "SWA"


def test_the_table_of_languages_in_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "sdrrl.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| ([A-Z]{3}) \| (yes|no) \| (yes|no) \|", text, re.MULTILINE)
    lingua, cld3 = (load_identifier(IdentifierSettings(name=name)) for name in ("lingua", "cld3"))
    assert lingua is not None
    assert cld3 is not None
    assert table == [
        (one.code, *("yes" if known.covers(one) else "no" for known in (lingua, cld3)))
        for one in sorted(AFRICAN, key=lambda one: one.code)
    ]


class Says:
    """Translates by a function, and answers with a text."""

    def __init__(self, say: Callable[[str], Any]) -> None:
        self.say = say
        self.asked: list[str] = []

    def translate(self, texts: Sequence[str], source: Language, target: Language) -> list[str]:
        self.asked += texts
        found = self.say(texts) if self.say is fewer else [self.say(text) for text in texts]
        return found

    def answer(self, questions: Sequence[tuple[int, str]]) -> list[Answer]:
        return [Answer(f"own {number}", number % 5 != 0) for number, _ in questions]

    def covers(self, asked: Language) -> bool:
        return True

    def identify(self, text: str) -> str | None:
        return "SWA" if text.startswith("sw ") else "YOR"

    def scores(self, sources: Sequence[str], translations: Sequence[str]) -> list[float]:
        return [0.5 if "bad" in source else 0.9 for source in sources]


def fewer(texts: Sequence[str]) -> list[str]:
    return list(texts)[1:]


QUESTIONS = [Question(f"q:{n}", n, f"q.jsonl:{n}", f"mango {n}", f"data {n}") for n in range(1, 41)]
PAIRS = [
    SentencePair("c:1", "c.tsv:1", "Good day to you", "Siku njema kwako"),
    SentencePair("c:2", "c.tsv:2", "A", "E"),
]


class Unwatched:
    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda count: None


def make(
    folder: Path, say: Callable[[str], Any] = "sw {}".format, questions: Sequence[Question] = QUESTIONS, **settings: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Says]:
    folder.mkdir(exist_ok=True)
    (folder / "words").write_text("mango\tembe\nlanguage\tsw\n", encoding="utf-8")
    worker = Says(say)
    workers = Workers(
        lambda: worker, lambda: worker, worker, worker, {"SWA": read_dictionary(str(folder / "words"), "gatitos")}
    )
    tree = {"dir": str(folder), "questions": {"path": "q", "layout": "gsm8k"}, "targets": ("SWA",), **settings}
    Build(SdrrlSettings.model_validate(tree), 3, folder, questions, {"SWA": PAIRS}, workers, Unwatched()).run()
    read = [(folder / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("rows", "rejected")]
    kept, rejected = ([json.loads(line) for line in text.splitlines()] for text in read)
    return kept, rejected, worker


def test_every_row_says_what_it_is_made_of(tmp_path: Path) -> None:
    rows, rejected, _ = make(tmp_path / "a", code_switch=0.0)
    found = {row["id"]: row for row in rows}
    assert len(found) == len(rows)
    own = {row["group"] for row in rows if row["provenance"]["response"] == "own"}
    assert 8 <= len(own) <= 24  # of 40 by a fair coin, those that end
    for question in QUESTIONS:
        group = f"{question.key}/SWA"
        text = f"own {question.number}" if group in own else question.response
        if f"{group}/LL" not in found:
            assert {row["reason"] for row in rejected if row["group"] == group} == {
                "the model's own response does not end within the limits"
            }
            continue
        expected = {
            "LL": (question.problem, text, "EN"), "TL": (f"sw {question.problem}", text, "EN"),
            "LT": (question.problem, f"sw {text}", "SWA"), "TT": (f"sw {question.problem}", f"sw {text}", "SWA"),
        }  # fmt: skip
        for subset, (problem, solution, spoken) in expected.items():
            row = found[f"{group}/{subset}"]
            assert (row["problem"], row["solution"], row["language"]) == (problem, solution, spoken)
            assert row["provenance"]["question"] == question.where
            assert ("problem_translated" in row["provenance"]) == (subset[0] == "T")
    corpus = [row for row in rows if row["verbatim"]]
    assert [(row["subset"], row["language"], row["solution"]) for row in corpus] == [
        ("mt", "SWA", "Siku njema kwako"), ("mt", "EN", "Good day to you"), ("comp", "SWA", "Siku njema kwako"),
        ("mt", "SWA", "E"), ("mt", "EN", "A"),
    ]  # fmt: skip
    assert [row["reason"] for row in rejected if row["subset"] == "comp"] == ["the sentence can't be cut"]


def test_the_direction_of_the_dictionary_follows_from_the_subset(tmp_path: Path) -> None:
    rows, _, _ = make(tmp_path / "a", code_switch=1.0, own_share=0.0)
    problems = Counter((row["subset"], row["problem"].split()[0], row["solution"].split()[0]) for row in rows[:160])
    assert problems == {
        ("LL", "embe", "data"): 40, ("LT", "embe", "sw"): 40, ("TL", "language", "data"): 40,
        ("TT", "language", "sw"): 40,
    }  # fmt: skip
    assert rows[0]["provenance"]["switched"] == [[0, "mango", "embe"]]


@pytest.mark.parametrize(
    ("say", "reason"),
    [
        ("".format, "there is no translation: it is empty, does not end, or is in no table"),
        ("yo {}".format, "the translation is in YOR"),
        ("sw bad {}".format, None),
    ],
)
def test_what_is_rejected(tmp_path: Path, say: Callable[[str], str], reason: str | None) -> None:
    rows, rejected, _ = make(tmp_path / "a", say, own_share=0.0, subsets=("LL", "TT"))
    assert sum(row["subset"] == "LL" for row in rows) == 40
    assert sum(row["subset"] == "TT" for row in rows) == (0 if reason else 40)
    assert {row["reason"] for row in rejected} == ({reason} if reason else set())


def test_a_translation_of_low_quality_is_rejected(tmp_path: Path) -> None:
    questions = [Question("q:1", 1, "q:1", "bad mango", "fine"), Question("q:2", 2, "q:2", "mango", "fine")]
    rows, rejected, _ = make(tmp_path / "a", questions=questions, own_share=0.0, subsets=("TL", "LT"))
    assert [row["id"] for row in rows] == ["q:1/SWA/LT", "q:2/SWA/TL", "q:2/SWA/LT"]
    assert [(row["id"], row["reason"]) for row in rejected] == [("q:1/SWA/TL", "the translation's quality is too low")]
    assert rejected[0]["provenance"]["problem_translated"] == {"quality": 0.5, "language": "SWA"}


@pytest.mark.parametrize("say", [fewer, lambda text: None])
def test_a_translator_that_gives_something_else(tmp_path: Path, say: Any) -> None:
    with pytest.raises(UserError, match=r"sdrrl\.translator: 'Says': the translator gave"):
        make(tmp_path / "a", say)
    assert not (tmp_path / "a" / "rows.jsonl").exists()
    assert not list((tmp_path / "a").glob("*.partial"))


def test_a_build_goes_on_where_it_was(tmp_path: Path) -> None:
    """A journal that was cut anywhere is added to, and the rows are the same bytes."""
    make(tmp_path / "whole", own_batch=4)
    whole = (tmp_path / "whole" / "rows.jsonl").read_bytes()
    journal = (tmp_path / "whole" / "translations.jsonl").read_bytes()
    for cut in (0, 1, len(journal) // 3, len(journal) // 2, len(journal) - 1):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / "translations.jsonl").write_bytes(journal[:cut])
        _, _, worker = make(folder, own_batch=4)
        assert (folder / "rows.jsonl").read_bytes() == whole
        finished = journal[:cut].count(b"\n") // 4 * 4  # a batch that is not whole is computed whole
        assert len(worker.asked) == 2 * (journal.count(b"\n") - finished)
        lines = (folder / "translations.jsonl").read_bytes().splitlines()
        assert sorted(lines) == sorted(journal.splitlines())


def test_a_build_is_not_continued_with_other_settings(tmp_path: Path) -> None:
    settings = {"sdrrl.own_share": 0.5, "run.seed": 3}
    assert begin(tmp_path, settings) is False
    assert begin(tmp_path, settings) is True
    with pytest.raises(UserError, match=r"run\.seed: 4: the build in .* was begun with 3"):
        begin(tmp_path, {**settings, "run.seed": 4})
    (tmp_path / "build.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match=r"build\.json: .*does not say"):
        begin(tmp_path, settings)


def test_a_damaged_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"key": "a"}\n[1]\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"journal\.jsonl:2"):
        Journal(path, ())
    path.write_text('{"key": "a"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"journal\.jsonl:1"):
        Journal(path, ("text",))


def test_a_journal_may_be_cut_within_a_character(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, ()).add([{"key": "a", "text": "ጥያቄ"}, {"key": "b", "text": "Yorùbá"}])
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        found = Journal(path, ("text",))
        assert ["a" in found, "b" in found] == [whole[:cut].count(b"\n") > n for n in (0, 1)]
        assert path.read_bytes() == whole[: whole[:cut].rfind(b"\n") + 1]


def test_words_of_every_script(tmp_path: Path) -> None:
    path = tmp_path / "words"
    path.write_text("year\tবছরের\nchild\tశిశువు\nquestion\tጥያቄ\n", encoding="utf-8")
    _, back = read_dictionary(str(path), "gatitos")
    assert back.switched("বছরের, శిశువు ጥያቄ? বছর", 1.0, 0)[0] == "year, child question? বছর"


def test_files_of_others_are_left(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"sdrrl\.dir: 'rows\.jsonl': .*it is not a build's"):
        begin(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
