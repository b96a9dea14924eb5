"""Supervised samples: the response is the solution and EOS, and the view decides whose prompt precedes it."""

import pytest
from small_tokenizer import small_tokenizer

from megatron_copsd.config.schema import PromptSettings
from megatron_copsd.data.prompts import PromptBuilder
from megatron_copsd.data.supervised import ReferenceBuilder
from megatron_copsd.errors import UserError
from megatron_copsd.types import Problem

PROBLEM = Problem("sw.tsv:3", "SWA", "Mbili na mbili?", "Two and two?", "2 + 2 = 4\n#### 4", "4")
PLAIN = PromptSettings(template="plain")


@pytest.mark.parametrize(("template", "start"), [("plain", " "), ("chat", "")])
@pytest.mark.parametrize("adds", [{}, {"adds_bos": True, "adds_eos": True}])
def test_response_is_the_solution_and_one_eos(template: str, start: str, adds: dict[str, bool]) -> None:
    tokenizer = small_tokenizer(**adds)
    rollout = ReferenceBuilder(tokenizer, PromptSettings(template=template), 100).rollout(PROBLEM)
    assert rollout.response.count(tokenizer.eos_token_id) == 1
    assert rollout.response[-1] == tokenizer.eos_token_id
    assert tokenizer.bos_token_id not in rollout.response
    decoded = tokenizer.decode(rollout.response[:-1], clean_up_tokenization_spaces=False)
    assert decoded == f"{start}{PROBLEM.solution}"
    assert rollout.token_log_probs == (0.0,) * len(rollout.response)
    assert (rollout.finish_reason, rollout.weight_version, rollout.text) == ("stop", 0, PROBLEM.solution)


def test_prompt_and_response_together_are_tokenised_as_one_text() -> None:
    tokenizer = small_tokenizer()
    builder = PromptBuilder(tokenizer, PLAIN)
    rollout = ReferenceBuilder(tokenizer, PLAIN, 100).rollout(PROBLEM)
    whole = tokenizer(f"{builder.texts(PROBLEM)[0]} {PROBLEM.solution}", add_special_tokens=False)["input_ids"]
    assert builder.pair(PROBLEM).student_prompt + rollout.response[:-1] == tuple(whole)


def test_longer_solutions_are_dropped_or_refused_never_cut() -> None:
    tokenizer = small_tokenizer()
    length = len(ReferenceBuilder(tokenizer, PLAIN, 100).rollout(PROBLEM).response)
    assert ReferenceBuilder(tokenizer, PLAIN, length).rollout(PROBLEM) is not None
    assert ReferenceBuilder(tokenizer, PLAIN, length - 1).rollout(PROBLEM) is None
    strict = PromptSettings(template="plain", overlong="error")
    with pytest.raises(UserError, match=r"^sw\.tsv:3: .*rollout\.max_response_tokens"):
        ReferenceBuilder(tokenizer, strict, length - 1).rollout(PROBLEM)


def test_what_cannot_be_trained_on_is_refused() -> None:
    tokenizer = small_tokenizer()
    with pytest.raises(UserError, match=r"^x:1: None: the problem has no solution"):
        ReferenceBuilder(tokenizer, PLAIN, 100).rollout(Problem("x:1", "SWA", "?"))
    with pytest.raises(UserError, match=r"^x:2: '<\|end\|>'"):
        ReferenceBuilder(tokenizer, PLAIN, 100).rollout(Problem("x:2", "SWA", "?", solution="4<|end|>5"))
    with pytest.raises(UserError, match=r"prompt\.thinking: 'prefix'"):
        ReferenceBuilder(tokenizer, PromptSettings(thinking="prefix"), 100)
    with pytest.raises(UserError, match=r"prompt\.student_thinking: 'prefix'"):
        ReferenceBuilder(tokenizer, PromptSettings(student_thinking="prefix"), 100)
    privileged = PromptSettings(teacher_thinking="prefix")
    with pytest.raises(UserError, match=r"prompt\.teacher_thinking: 'prefix'"):
        ReferenceBuilder(tokenizer, privileged, 100, ["student", "teacher"])
    assert ReferenceBuilder(tokenizer, privileged, 100).rollout(PROBLEM) is not None
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="EOS"):
        ReferenceBuilder(tokenizer, PLAIN, 100)
