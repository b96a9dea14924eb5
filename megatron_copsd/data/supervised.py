"""Supervised training: the reference solution in the place of a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_copsd.config.schema import PromptSettings
from megatron_copsd.data.prompts import encode, reject_special_tokens
from megatron_copsd.errors import UserError, describe
from megatron_copsd.types import Problem, Rollout, View

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ReferenceBuilder:
    """Turns reference solutions into responses, in the form rollouts have.

    Args:
        tokenizer: the model's tokenizer; its EOS ends every response.
        settings: the ``prompt`` section that the prompts are built with.
        max_response_tokens: longest response, EOS included; ``prompt.overlong`` says what happens to a longer one.
        views: whose prompts the responses continue.

    Raises:
        UserError: the tokenizer has no EOS, or the prompts end inside a thinking block, which no solution continues.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: PromptSettings,
        max_response_tokens: int,
        views: Sequence[View] = ("student",),
    ) -> None:
        if tokenizer.eos_token_id is None:
            rule = "supervised training ends every response with the tokenizer's EOS, and it has none"
            raise UserError(describe("model.path", tokenizer.name_or_path, rule, "Set eos_token in the tokenizer."))
        for view in views:
            thinking, setting = settings.thinking_of(view)
            if thinking == "prefix":
                rule = (
                    "the prompt ends inside a thinking block, and a reference solution has no thinking to continue it"
                )
                raise UserError(describe(setting, thinking, rule, "Set it empty or off."))
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
