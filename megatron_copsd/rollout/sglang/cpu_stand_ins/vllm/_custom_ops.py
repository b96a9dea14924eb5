"""The one name of vLLM's that SGLang imports there."""

from __future__ import annotations

from typing import Any, NoReturn


def rotary_embedding(*arguments: Any) -> NoReturn:
    """Never called: SGLang has an implementation of its own for CPUs."""
    raise NotImplementedError("vLLM is not installed; SGLang was expected to use its own rotary embedding")
