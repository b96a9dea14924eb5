"""Training methods: one small file each, and the registry that the loop takes them from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megatron_copsd.config.method import TRAITS, MethodName
from megatron_copsd.config.schema import Config
from megatron_copsd.methods.base import Method
from megatron_copsd.methods.copsd import Copsd
from megatron_copsd.methods.grpo import Grpo
from megatron_copsd.methods.opsd import Opsd
from megatron_copsd.methods.sampled_token import SampledToken
from megatron_copsd.methods.sft import Sft

METHODS: Mapping[MethodName, Callable[[Config], Method]] = {
    "copsd": Copsd,
    "opsd": Opsd,
    "sampled_token": SampledToken,
    "grpo": Grpo,
    "sft": Sft,
}

assert set(METHODS) == set(TRAITS)


def build_method(config: Config) -> Method:
    """Return the method that the configuration trains with."""
    return METHODS[config.method.name](config)
