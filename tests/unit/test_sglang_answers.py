"""What a server's answer becomes; bodies as SGLang 0.5.23 gives them."""

from __future__ import annotations

import pytest

from megatron_copsd.errors import UserError
from megatron_copsd.rollout.sglang.client import ServerLost, _answer
from megatron_copsd.types import VersionSpan


def body(log_probs: list[float | None], reason: dict[str, object]) -> dict[str, object]:
    ids = [7042, 30]
    meta = {
        "finish_reason": reason,
        "output_token_logprobs": [[value, token, None] for value, token in zip(log_probs, ids, strict=True)],
        "weight_versions": [{"version": "default", "start": 0, "end": 1}, {"version": "12", "start": 1, "end": 2}],
    }
    return {"output_ids": ids, "meta_info": meta}


def test_ids_log_probabilities_and_versions() -> None:
    answer = _answer(body([-0.5, -1.5], {"type": "stop", "matched": 30}))
    assert answer.response == (7042, 30)
    assert answer.token_log_probs == (-0.5, -1.5)
    assert answer.finish_reason == "stop"
    assert answer.versions == (VersionSpan(-1, 0, 1), VersionSpan(12, 1, 2))


def test_weights_that_give_no_numbers() -> None:
    with pytest.raises(UserError, match="no numbers"):
        _answer(body([-0.5, None], {"type": "length", "length": 2}))


def test_an_aborted_request_is_one_to_send_again() -> None:
    with pytest.raises(ServerLost, match="aborted"):
        _answer(body([-0.5, -1.5], {"type": "abort", "message": "Aborted"}))
