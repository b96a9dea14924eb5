"""One SGLang server over HTTP: token ids in, token ids and log-probabilities out.

What crashes a server is refused here, before it is sent: prompts that are empty, ids outside the vocabulary, prompts
with no room for a response, numbers that are none. SGLang is never imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import httpx

from megatron_copsd.config.sections.sglang import KEPT_POSITIONS
from megatron_copsd.errors import UserError, describe
from megatron_copsd.rollout.engine import Request, Sampling
from megatron_copsd.types import VersionSpan

_CONNECT_SECONDS = 5.0
_CLIENT_ERROR, _SERVER_ERROR = 400, 500


class ServerLost(Exception):
    """The server did not answer as a live one does: try again, here or elsewhere."""


@dataclass(frozen=True)
class Limits:
    """What a server of one model takes: ids in [0, vocab_size), at most ``positions`` tokens of prompt and response."""

    vocab_size: int
    positions: int

    def check(self, prompt: tuple[int, ...], max_tokens: int) -> None:
        """Raise UserError for a request that the server must not see."""
        if not prompt:
            raise UserError(describe("prompt", "[]", "must have at least one token", "Drop the problem."))
        for position, token in enumerate(prompt):
            if not self._is_token(token):
                rule = f"must be an integer from 0 to {self.vocab_size - 1}"
                raise UserError(describe(f"prompt token {position}", token, rule, "Use the model's own tokenizer."))
        usable = self.positions - KEPT_POSITIONS
        if not _is_integer(max_tokens) or max_tokens < 1 or len(prompt) + max_tokens > usable:
            rule = (
                f"at least 1, and with the prompt's {len(prompt)} tokens at most {usable}, the model's positions less "
                f"the {KEPT_POSITIONS} that SGLang keeps"
            )
            remedy = "Lower it, or lower prompt.max_student_tokens."
            raise UserError(describe("rollout.max_response_tokens", max_tokens, rule, remedy))

    def check_sampling(self, sampling: Sampling, seed: int) -> None:
        """Raise UserError for numbers that the server must not see, or that JSON has no form for."""
        temperature, top_p, top_k = sampling.temperature, sampling.top_p, sampling.top_k
        stop_ids_rule = f"each must be an integer from 0 to {self.vocab_size - 1}"
        for where, value, holds, rule in (
            ("temperature", temperature, _is_number(temperature) and 0 <= temperature < math.inf, "at least 0, finite"),
            ("top_p", top_p, _is_number(top_p) and 0 < top_p <= 1, "must be above 0, at most 1"),
            ("top_k", top_k, _is_integer(top_k) and top_k >= 0, "must be an integer, at least 0"),
            ("stop_token_ids", sampling.stop_ids, all(map(self._is_token, sampling.stop_ids)), stop_ids_rule),
            ("seed", seed, _is_integer(seed), "must be an integer"),
        ):
            if not holds:
                raise UserError(describe(f"rollout.{where}", value, rule, "Correct it."))

    def _is_token(self, value: object) -> bool:
        return _is_integer(value) and 0 <= value < self.vocab_size


@dataclass(frozen=True)
class Answer:
    """A response as the server gave it; fields as in ``Rollout``."""

    response: tuple[int, ...]
    token_log_probs: tuple[float, ...]
    finish_reason: str
    versions: tuple[VersionSpan, ...]


class SglangClient:
    """Requests to one server; safe to share between threads."""

    def __init__(
        self, url: str, limits: Limits, request_seconds: float, connections: int, silence_seconds: float = 120.0
    ) -> None:
        """Take an address and limits of patience.

        Args:
            url: of the server.
            limits: of its model.
            request_seconds: longest wait for one response.
            connections: responses that may be waited for at once.
            silence_seconds: longest time that its scheduler may be busy with one batch.
        """
        self.url = url.rstrip("/")
        self._limits, self._request_seconds, self._connections = limits, request_seconds, connections
        self._silence_seconds = silence_seconds
        # A connection each: the server closes idle ones after seconds, and a request that meets the close is lost.
        fresh = {"max_keepalive_connections": 0}
        timeout = httpx.Timeout(request_seconds, connect=_CONNECT_SECONDS, pool=None)
        # Proxies of the environment are for the world outside, not for servers named by address.
        common: dict[str, Any] = {"base_url": self.url, "timeout": timeout, "trust_env": False}
        self._http = httpx.Client(limits=httpx.Limits(max_connections=connections, **fresh), **common)
        # Apart from those: all others may be waiting for responses that only the next control call sets free.
        self._control = httpx.Client(limits=httpx.Limits(**fresh), **common)

    def at(self, url: str) -> SglangClient:
        """The same client for another address."""
        return SglangClient(url, self._limits, self._request_seconds, self._connections, self._silence_seconds)

    def close(self) -> None:
        """Drop the connections."""
        self._http.close()
        self._control.close()

    def is_ready(self) -> bool:
        """Whether the server says that it takes requests; one that is paused does not."""
        return self._says_ok("/ready", _CONNECT_SECONDS)

    def answers(self) -> bool:
        """Whether the server's scheduler answers, which it does between any two batches of tokens, and paused too."""
        return self._says_ok("/server_info", self._silence_seconds)

    def _says_ok(self, path: str, seconds: float) -> bool:
        try:
            return self._control.get(path, timeout=seconds).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def generate(self, request: Request, sampling: Sampling) -> Answer:
        """Sample one response.

        Raises:
            UserError: the request is one that the server must not see, or that it refuses.
            ServerLost: no answer, or one that was cut short.
        """
        self._limits.check(request.prompt, sampling.max_tokens)
        self._limits.check_sampling(sampling, request.seed)
        body = {
            "input_ids": list(request.prompt),
            "sampling_params": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                # As many as there are is off, too; the server keeps 32 bits of it.
                "top_k": sampling.top_k if 0 < sampling.top_k < self._limits.vocab_size else -1,
                "max_new_tokens": sampling.max_tokens,
                "stop_token_ids": list(sampling.stop_ids),
                "sampling_seed": request.seed % 2**31,
            },
            "return_logprob": True,
        }
        answer = _answer(self.call("/generate", body))
        if answer.finish_reason == "length" and len(answer.response) < sampling.max_tokens:
            # The server shortens what its cache can't hold, and calls it by the same name.
            rule = f"the server's cache had room for {len(answer.response)} of {sampling.max_tokens} response tokens"
            raise UserError(
                describe("sglang.max_total_tokens", self.url, rule, "Raise it, or ask for shorter responses.")
            )
        return answer

    def score(self, tokens: tuple[int, ...]) -> tuple[float | None, ...]:
        """Log-probability of every token but the first, given those before it, at temperature 1; None for NaN."""
        self._limits.check(tokens, 1)
        body = {
            "input_ids": list(tokens),
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        return tuple(triple[0] for triple in self.call("/generate", body)["meta_info"]["input_token_logprobs"][1:])

    def call(self, path: str, body: Mapping[str, Any] | None = None, seconds: float | None = None) -> Any:
        """POST a JSON body (GET without one) and return the JSON answer, None for an empty one.

        Raises:
            UserError: the server refuses the request.
            ServerLost: no answer, or an error of the server's own.
        """
        http = self._http if path == "/generate" else self._control
        timeout = http.timeout if seconds is None else httpx.Timeout(seconds, connect=_CONNECT_SECONDS)
        try:
            answer = http.get(path, timeout=timeout) if body is None else http.post(path, json=body, timeout=timeout)
        except httpx.HTTPError as error:
            raise ServerLost(f"{self.url}{path}: {type(error).__name__}: {error}") from error
        if answer.status_code >= _SERVER_ERROR:
            raise ServerLost(f"{self.url}{path}: HTTP {answer.status_code}: {_reason(answer)}")
        if answer.status_code >= _CLIENT_ERROR:
            remedy = "See the server's log."
            raise UserError(describe(f"{self.url}{path}", f"HTTP {answer.status_code}", _reason(answer), remedy))
        try:
            return answer.json() if answer.content else None
        except ValueError:
            return answer.text


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return _is_integer(value) or isinstance(value, float)


def _reason(answer: httpx.Response) -> str:
    """What an error says, in the several forms that SGLang says it in."""
    try:
        body = answer.json()
    except ValueError:
        return answer.text[:300] or answer.reason_phrase
    if isinstance(body, dict):
        error = body.get("error", body)
        body = error.get("message", error) if isinstance(error, dict) else error
    return str(body)[:300]


def _answer(body: Mapping[str, Any]) -> Answer:
    meta = body["meta_info"]
    reason = meta["finish_reason"]["type"]
    if reason == "abort":  # with HTTP 200
        raise ServerLost(f"aborted: {meta['finish_reason'].get('message')}")
    triples = meta["output_token_logprobs"]
    response = tuple(body["output_ids"])
    if [triple[1] for triple in triples] != list(response):
        raise ServerLost("log-probabilities and ids of a response do not belong together")
    if any(triple[0] is None for triple in triples):  # null is what JSON says of NaN
        rule = "the server's log-probabilities are no numbers"
        raise UserError(describe("rollout", "NaN", rule, "Look at the weights: the loss may have diverged."))
    spans = tuple(
        VersionSpan(_version(span["version"]), span["start"], span["end"]) for span in meta["weight_versions"]
    )
    return Answer(response, tuple(triple[0] for triple in triples), reason, spans)


def _version(label: str) -> int:
    """Our labels are numbers; a server that no trainer has given weights yet has a word."""
    return int(label) if label.isdecimal() else -1
