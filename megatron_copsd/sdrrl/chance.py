"""Random choices that are functions of their names: the same on every platform, and whatever else was chosen before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

Choice = TypeVar("Choice")

_BITS = 53  # what a float has


def uniform(*names: object) -> float:
    """Return a number of [0, 1), by the seed and whatever else names the choice."""
    digest = hashlib.blake2b("\0".join(map(str, names)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> (64 - _BITS)) / (1 << _BITS)


def choose(choices: Sequence[Choice], *names: object) -> Choice:
    """Return one of several, each as likely."""
    return choices[int(uniform(*names) * len(choices))]
