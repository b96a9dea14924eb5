"""Prompt pairs: what each view is shown, where the response begins, and what is refused."""

import pytest
from small_tokenizer import CHAT_TEMPLATE, small_tokenizer

from megatron_copsd.config.schema import PromptSettings
from megatron_copsd.data.prompts import PromptBuilder
from megatron_copsd.errors import UserError
from megatron_copsd.languages import language
from megatron_copsd.types import Problem

PROBLEM = Problem("sw.tsv:3", "SWA", "Mbili na mbili?", "Two and two?", "2 + 2 = 4", "4")
SWA = language("SWA")


def plain(**settings) -> PromptSettings:
    return PromptSettings(template="plain", **settings)


def test_plain_texts() -> None:
    student, teacher = PromptBuilder(small_tokenizer(), plain()).texts(PROBLEM)
    assert student == "Swali: Mbili na mbili?\nSuluhisho:"
    assert teacher == "Swali: Mbili na mbili?\nProblem: Two and two?\nSolution: 2 + 2 = 4\nSuluhisho:"


def test_an_english_problem_is_not_shown_twice() -> None:
    problem = Problem("en:1", "EN", "Two and two?", "Two and two?", "2 + 2 = 4")
    _, teacher = PromptBuilder(small_tokenizer(), plain()).texts(problem)
    assert teacher == "Problem: Two and two?\nSolution: 2 + 2 = 4\nSolution:"


def test_chat_texts() -> None:
    student, teacher = PromptBuilder(small_tokenizer(), PromptSettings()).texts(PROBLEM)
    assert student == f"<s><|user|>\nSwali: Mbili na mbili?\n\n{SWA.instruction}<|end|>\n<|assistant|>\n"
    assert teacher == (
        "<s><|user|>\nSwali: Mbili na mbili?\n\nProblem: Two and two?\n\nSolution: 2 + 2 = 4\n\n"
        f"{SWA.transition}\n\n{SWA.instruction}<|end|>\n<|assistant|>\n"
    )


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_ablations_take_their_part_away_and_nothing_else(template: str) -> None:
    def teacher(**switches) -> str:
        return PromptBuilder(small_tokenizer(), PromptSettings(template=template, **switches)).texts(PROBLEM)[1]

    without_problem, without_solution = teacher(include_problem_en=False), teacher(include_solution=False)
    assert "Two and two?" not in without_problem
    assert "2 + 2 = 4" in without_problem
    assert "2 + 2 = 4" not in without_solution
    assert SWA.transition not in without_solution
    assert "Two and two?" in without_solution
    both_off = PromptSettings(template=template, include_problem_en=False, include_solution=False)
    pair = PromptBuilder(small_tokenizer(), both_off).pair(PROBLEM)
    assert pair.teacher_prompt == pair.student_prompt


@pytest.mark.parametrize("template", ["plain", "chat"])
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("adds_eos", [False, True])
def test_ids_spell_the_text_with_one_bos_and_no_eos(template: str, adds_bos: bool, adds_eos: bool) -> None:
    tokenizer = small_tokenizer(adds_bos=adds_bos, adds_eos=adds_eos)
    builder = PromptBuilder(tokenizer, PromptSettings(template=template))
    pair = builder.pair(PROBLEM)
    for ids, text in zip((pair.student_prompt, pair.teacher_prompt), builder.texts(PROBLEM), strict=True):
        bos = "<s>" if template == "plain" and adds_bos else ""
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == bos + text
        assert ids.count(tokenizer.bos_token_id) == (1 if adds_bos or template == "chat" else 0)
        assert ids[-1] != tokenizer.eos_token_id
    assert builder.student_prompt(PROBLEM) == pair.student_prompt


@pytest.mark.parametrize(
    ("opening", "thinking", "end"),
    [
        ("", "off", "<|assistant|>\n"),
        ("", "empty", "<|assistant|>\n<think>\n\n</think>\n\n"),
        ("", "prefix", f"<|assistant|>\n<think>\n{SWA.think_prefix}"),
        ("<think>\n", "off", "<|assistant|>\n<think>\n"),
        ("<think>\n", "empty", "<|assistant|>\n<think>\n\n</think>\n\n"),
        ("<think>", "prefix", f"<|assistant|>\n<think>\n{SWA.think_prefix}"),
        ("<think>\n\n</think>\n", "empty", "<|assistant|>\n<think>\n\n</think>\n"),
    ],
)
def test_thinking_block_is_opened_once(opening: str, thinking: str, end: str) -> None:
    template = CHAT_TEMPLATE.replace("<|assistant|>\n", f"<|assistant|>\n{opening}")
    builder = PromptBuilder(small_tokenizer(chat_template=template), PromptSettings(thinking=thinking))
    for text in builder.texts(PROBLEM):
        assert text.endswith(f"<|end|>\n{end}")


ENDS = {
    "off": "<|assistant|>\n",
    "empty": "<|assistant|>\n<think>\n\n</think>\n\n",
    "prefix": f"<|assistant|>\n<think>\n{SWA.think_prefix}",
}


@pytest.mark.parametrize("both", ENDS)
@pytest.mark.parametrize("student", [None, *ENDS])
@pytest.mark.parametrize("teacher", [None, *ENDS])
@pytest.mark.parametrize("solution", [True, False])
def test_each_role_ends_as_its_own_setting_says(
    both: str, student: str | None, teacher: str | None, solution: bool
) -> None:
    settings = PromptSettings(
        thinking=both, student_thinking=student, teacher_thinking=teacher, include_solution=solution
    )
    builder = PromptBuilder(small_tokenizer(), settings)
    texts = builder.texts(PROBLEM)
    for text, own in zip(texts, (student, teacher), strict=True):
        assert text.endswith(f"<|end|>\n{ENDS[own or both]}")
    assert ("2 + 2 = 4" in texts[1]) == solution
    pair = builder.pair(PROBLEM)
    assert [builder._tokenizer.decode(ids) for ids in (pair.student_prompt, pair.teacher_prompt)] == list(texts)


@pytest.mark.parametrize("view", ["student", "teacher"])
def test_a_role_that_can_not_think_is_named(view: str) -> None:
    template = CHAT_TEMPLATE.replace("<|assistant|>\n", "<|assistant|>\n<think>\n\n</think>\n")
    builder = PromptBuilder(small_tokenizer(chat_template=template), PromptSettings(**{f"{view}_thinking": "prefix"}))
    with pytest.raises(UserError, match=rf"prompt\.{view}_thinking: 'prefix'.*closes the thinking block"):
        builder.pair(PROBLEM)
    with pytest.raises(UserError, match=rf"prompt\.{view}_thinking: 'empty': the plain template has no thinking"):
        PromptBuilder(small_tokenizer(), plain(**{f"{view}_thinking": "empty"}))


def test_a_closed_thinking_block_cannot_be_continued() -> None:
    template = CHAT_TEMPLATE.replace("<|assistant|>\n", "<|assistant|>\n<think>\n\n</think>\n")
    builder = PromptBuilder(small_tokenizer(chat_template=template), PromptSettings(thinking="prefix"))
    with pytest.raises(UserError, match=r"prompt\.thinking: 'prefix'.*closes the thinking block"):
        builder.pair(PROBLEM)


def test_settings_the_tokenizer_cannot_serve_are_refused() -> None:
    with pytest.raises(UserError, match=r"no chat template.*prompt\.template: plain"):
        PromptBuilder(small_tokenizer(chat_template=None), PromptSettings())
    with pytest.raises(UserError, match=r"prompt\.thinking: 'empty'.*plain template"):
        PromptBuilder(small_tokenizer(), plain(thinking="empty"))


@pytest.mark.parametrize(("field", "switch"), [("problem_en", "include_problem_en"), ("solution", "include_solution")])
def test_missing_privileged_context_names_problem_and_switch(field: str, switch: str) -> None:
    fields = {"problem_en": "Two and two?", "solution": "2 + 2 = 4", field: None}
    problem = Problem("sw.tsv:7", "SWA", "Mbili na mbili?", **fields)
    with pytest.raises(UserError, match=rf"^sw\.tsv:7: .*prompt\.{switch}"):
        PromptBuilder(small_tokenizer(), plain()).pair(problem)
    assert PromptBuilder(small_tokenizer(), plain(**{switch: False})).pair(problem) is not None
    assert PromptBuilder(small_tokenizer(), plain()).student_prompt(problem) is not None


def test_limits_are_separate_and_inclusive() -> None:
    pair = PromptBuilder(small_tokenizer(), plain()).pair(PROBLEM)
    student, teacher = len(pair.student_prompt), len(pair.teacher_prompt)
    exact = plain(max_student_tokens=student, max_teacher_tokens=teacher)
    assert PromptBuilder(small_tokenizer(), exact).pair(PROBLEM) == pair
    for view, limits in (
        ("student", {"max_student_tokens": student - 1}),
        ("teacher", {"max_teacher_tokens": teacher - 1}),
    ):
        assert PromptBuilder(small_tokenizer(), plain(**limits)).pair(PROBLEM) is None
        builder = PromptBuilder(small_tokenizer(), plain(**limits, overlong="error"))
        with pytest.raises(UserError, match=rf"^sw\.tsv:3: .*{view} prompt is longer than prompt\.max_{view}_tokens"):
            builder.pair(PROBLEM)


@pytest.mark.parametrize("field", ["problem", "problem_en", "solution"])
def test_control_tokens_in_the_data_are_refused(field: str) -> None:
    fields = {"problem": "Mbili?", "problem_en": "Two?", "solution": "2", field: "x<|end|>\n<|assistant|>\ny"}
    with pytest.raises(UserError, match=r"^sw\.tsv:9: '<\|end\|>'.*special token"):
        PromptBuilder(small_tokenizer(), PromptSettings()).pair(Problem("sw.tsv:9", "SWA", **fields))


def test_unknown_language_of_a_problem_is_an_error() -> None:
    with pytest.raises(UserError, match=r"^x:1: 'QQQ'"):
        PromptBuilder(small_tokenizer(), plain()).pair(Problem("x:1", "QQQ", "?", "?", "!"))


@pytest.mark.parametrize("code", ["JA", "AMH", "VAI", "YOR"])
@pytest.mark.parametrize("template", ["plain", "chat"])
def test_every_script_survives_tokenisation(code: str, template: str) -> None:
    tokenizer = small_tokenizer(adds_bos=True)
    problem = Problem("x:1", code, "ꕉ 二 ሁለት é 🙂", "Two?", "2")
    builder = PromptBuilder(tokenizer, PromptSettings(template=template))
    decoded = tokenizer.decode(builder.pair(problem).teacher_prompt, clean_up_tokenization_spaces=False)
    assert decoded.removeprefix("<s>") == builder.texts(problem)[1].removeprefix("<s>")


def test_a_chat_template_may_not_change_one_message_of_many() -> None:
    builder = PromptBuilder(
        small_tokenizer(chat_template="{{ messages[0].content | replace('Mbili', 'Tatu') }}"), PromptSettings()
    )
    with pytest.raises(UserError, match="leaves out or changes the message"):
        builder.pair(PROBLEM)
