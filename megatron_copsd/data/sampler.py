"""Which problems a step trains on: a pure function of seed and step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


class ProblemSampler:
    """Draws problems from several sources in fixed shares.

    The training stream is one infinite sequence of draws; step s takes the draws s * n to (s + 1) * n - 1. Nothing
    but the arguments decides it, so a run that resumes at step s needs no state, and no parallel layout changes it.

    Draws are given to sources by the rule of R. Tijdeman, "The chairman assignment problem" (1980): after any number
    of draws t, source k with share w_k has had t * w_k of them to within 1 - 1 / (2K - 2), K the number of sources.
    Within a source, draws go through seeded permutations: every row once before any row again.

    Args:
        sizes: rows of each source, at least 1.
        weights: share of each source in the stream, relative to the others, above 0.
        seed: ``run.seed``.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        assert sizes
        assert len(sizes) == len(weights)
        assert min(sizes) >= 1
        assert min(weights) > 0
        self._sizes = tuple(sizes)
        self._shares = tuple(weight / sum(weights) for weight in weights)
        self._seed = seed
        # Memory of where the last call stopped and of the permutations in use; results do not depend on it.
        self._position = 0
        self._counts = [0] * len(sizes)
        self._orders: dict[int, tuple[int, list[int]]] = {}

    def take(self, step: int, n: int) -> list[tuple[int, int]]:
        """Return the draws of one step.

        Args:
            step: steps done before this one.
            n: draws of every step; the same number throughout a run.

        Returns:
            n pairs (source, row).
        """
        assert step >= 0
        assert n >= 1
        if step * n < self._position:
            self._position, self._counts = 0, [0] * len(self._sizes)
        while self._position < step * n:
            self._next_source()
        draws = []
        for _ in range(n):
            source = self._next_source()
            draws.append((source, self._row(source, self._counts[source] - 1)))
        return draws

    def _next_source(self) -> int:
        """Advance by one draw and return its source."""
        self._position += 1
        sources = range(len(self._sizes))
        slack = 1 / (2 * len(sources) - 2) if len(sources) > 1 else 0.0
        lack = [self._position * share - count for share, count in zip(self._shares, self._counts, strict=True)]
        # Of the sources that may have one more, the one that must have it soonest. A tolerance keeps rounding of the
        # shares from emptying the list where a source lacks exactly the slack.
        allowed = [k for k in sources if lack[k] >= slack - 1e-6]
        chosen = min(allowed, key=lambda k: (1 - slack - lack[k]) / self._shares[k])
        self._counts[chosen] += 1
        return chosen

    def _row(self, source: int, draw: int) -> int:
        epoch, offset = divmod(draw, self._sizes[source])
        if source not in self._orders or self._orders[source][0] != epoch:
            self._orders[source] = (epoch, self._permutation(source, epoch))
        return self._orders[source][1][offset]

    def _permutation(self, source: int, epoch: int) -> list[int]:
        # Sorting by hash gives the same order on every platform and library version; shuffles do not promise that.
        def rank(row: int) -> bytes:
            return hashlib.blake2b(f"{self._seed}/{source}/{epoch}/{row}".encode(), digest_size=16).digest()

        return sorted(range(self._sizes[source]), key=rank)
