"""Responses of the model itself, through any rollout engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_copsd.data.prompts import PromptBuilder
from megatron_copsd.languages import Language
from megatron_copsd.rollout.collect import rollout_seed
from megatron_copsd.rollout.engine import Request, RolloutEngine, Sampling
from megatron_copsd.types import Problem, Rollout


class Answer(NamedTuple):
    """What the model said; ``ended``: it came to an end by itself, within the limits. Empty for too long a prompt."""

    text: str
    ended: bool


@dataclass(frozen=True)
class Responder:
    """An engine that has the model's weights, and how it is asked.

    Attributes:
        engine: samples.
        prompts: makes the prompts, as in training.
        sampling: of responses to questions.
        seed: ``run.seed``.
    """

    engine: RolloutEngine
    prompts: PromptBuilder
    sampling: Sampling
    seed: int

    def answer(self, questions: Sequence[tuple[int, str]]) -> list[Answer]:
        """Answer English questions; each is numbered, and its response depends on that number and not on the others."""
        problems = [Problem(f"question {number}", "EN", text) for number, text in questions]
        seeds = [rollout_seed(self.seed, 0, number) for number, _ in questions]
        return self._ask(problems, seeds, self.sampling)

    def answer_verbatim(self, questions: Sequence[str], language: Language, max_tokens: int) -> list[Answer]:
        """Answer questions that are whole prompts, each token the likeliest."""
        problems = [Problem("translation", language.code, text, verbatim=True) for text in questions]
        greedy = Sampling(0.0, 1.0, 0, max_tokens, self.sampling.stop_ids)
        return self._ask(problems, [0] * len(problems), greedy)

    def _ask(self, problems: Sequence[Problem], seeds: Sequence[int], sampling: Sampling) -> list[Answer]:
        prompts = [self.prompts.student_prompt(problem) for problem in problems]
        asked = [Request(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True) if prompt is not None]
        rollouts = iter(self._sampled(asked, sampling))
        answers = []
        for prompt in prompts:
            if prompt is None:
                answers.append(Answer("", False))
            else:
                rollout = next(rollouts)
                answers.append(Answer(rollout.text.strip(), rollout.finish_reason == "stop"))
        return answers

    def _sampled(self, asked: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        if not asked:
            return []
        self.engine.begin(asked, sampling)
        return self.engine.finish(0)
