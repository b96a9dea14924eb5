"""Supervised samples: the reference solution in the place of a rollout."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_copsd.config.schema import ObjectiveSettings, PromptSettings
from megatron_copsd.data.prompts import encode, reject_special_tokens
from megatron_copsd.errors import UserError, describe
from megatron_copsd.types import Problem, PromptPair, Rollout, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ReferenceBuilder:
    """Turns reference solutions into responses, in the form rollouts have.

    Args:
        tokenizer: the model's tokenizer; its EOS ends every response.
        settings: the ``prompt`` section that the prompts are built with.
        max_response_tokens: longest response, EOS included; ``prompt.overlong`` says what happens to a longer one.

    Raises:
        UserError: the tokenizer has no EOS, or the prompts end inside a thinking block, which no solution continues.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: PromptSettings, max_response_tokens: int) -> None:
        if tokenizer.eos_token_id is None:
            rule = "supervised training ends every response with the tokenizer's EOS, and it has none"
            raise UserError(describe("model.path", tokenizer.name_or_path, rule, "Set eos_token in the tokenizer."))
        if settings.thinking == "prefix":
            rule = "the prompt ends inside a thinking block, and a reference solution has no thinking to continue it"
            raise UserError(describe("prompt.thinking", "prefix", rule, "Set prompt.thinking: empty or off."))
        self._tokenizer = tokenizer
        self._settings = settings
        self._max_response_tokens = max_response_tokens

    def rollout(self, problem: Problem) -> Rollout | None:
        """Return the solution of a problem as a response.

        Returns:
            The response, of weight_version 0 and with log-probabilities 0 (no engine sampled it); None where it is
            over the limit and ``prompt.overlong`` is ``drop``.

        Raises:
            UserError: the problem has no solution, the solution holds a special token, or it is over the limit and
                ``prompt.overlong`` is ``error``.
        """
        if problem.solution is None:
            rule = "the problem has no solution to train on"
            raise UserError(describe(problem.id, None, rule, "Give the data solutions, or change objective.name."))
        reject_special_tokens(self._tokenizer, problem.solution, problem.id)
        # The plain prompt ends with a colon, so the response brings the space that belongs after it.
        start = " " if self._settings.template == "plain" else ""
        response = (*encode(self._tokenizer, start + problem.solution), self._tokenizer.eos_token_id)
        if len(response) > self._max_response_tokens:
            if self._settings.overlong == "drop":
                return None
            rule = f"the solution is longer than rollout.max_response_tokens ({self._max_response_tokens})"
            remedy = "Raise rollout.max_response_tokens, or set prompt.overlong: drop."
            raise UserError(describe(problem.id, f"{len(response)} tokens", rule, remedy))
        return Rollout(response, (0.0,) * len(response), "stop", 0, problem.solution)


def supervised_samples(
    items: Sequence[tuple[PromptPair, Rollout]], objective: ObjectiveSettings, seed: int, step: int
) -> list[Sample]:
    """Return the global batch of a supervised step; a sample that learns from the teacher's prompt has it as student's.

    Args:
        items: prompts and reference responses of the step's problems, in the order of the draw.
        objective: ``sft_view`` and ``sft_teacher_share``; for ``mixed`` a hash of (seed, step, index) decides each row.
        seed: ``run.seed``.
        step: steps done before this one.
    """
    samples = []
    for index, (pair, rollout) in enumerate(items):
        if _uses_teacher_prompt(objective, seed, step, index):
            pair = dataclasses.replace(pair, student_prompt=pair.teacher_prompt)
        samples.append(Sample(pair, rollout, index))
    return samples


def _uses_teacher_prompt(objective: ObjectiveSettings, seed: int, step: int, index: int) -> bool:
    if objective.sft_view != "mixed":
        return objective.sft_view == "teacher"
    digest = hashlib.blake2b(f"{seed}/{step}/{index}/sft_view".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < objective.sft_teacher_share * 2**64
