"""What each training method asks of a step: the one place where settings, planner and loop look it up.

The methods themselves, how their samples and their losses are made, are in ``megatron_copsd.methods``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

MethodName = Literal["copsd", "opsd", "sampled_token", "grpo", "sft"]


@dataclass(frozen=True)
class MethodTraits:
    """What a method needs.

    Attributes:
        name: as ``objective.name`` spells it.
        samples_responses: responses are the student's own rollouts; otherwise the data's reference solutions.
        uses_teacher: every step has a teacher pass.
        compares_vocabulary: teacher and student are compared at every entry of the vocabulary.
        grades_responses: every response is graded against the data's answer.
        compares_samples: the responses to a prompt are compared with each other.
        on_policy: responses are taken to be samples of the policy that they change, of all its tokens.
        shows_problem_en: the privileged context may have the English problem, as ``prompt.include_problem_en`` says.
    """

    name: MethodName
    samples_responses: bool = True
    uses_teacher: bool = False
    compares_vocabulary: bool = False
    grades_responses: bool = False
    compares_samples: bool = False
    on_policy: bool = False
    shows_problem_en: bool = True


_ALL = (
    MethodTraits("copsd", uses_teacher=True, compares_vocabulary=True),
    MethodTraits("opsd", uses_teacher=True, compares_vocabulary=True, shows_problem_en=False),
    MethodTraits("sampled_token", uses_teacher=True),
    MethodTraits("grpo", grades_responses=True, compares_samples=True, on_policy=True),
    MethodTraits("sft", samples_responses=False),
)
TRAITS: Mapping[MethodName, MethodTraits] = {traits.name: traits for traits in _ALL}
assert set(TRAITS) == set(get_args(MethodName))
