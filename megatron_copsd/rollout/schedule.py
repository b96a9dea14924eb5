"""The rollouts that an engine was asked for and the trainer has not used yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_copsd.rollout.engine import RolloutEngine
from megatron_copsd.types import PromptPair, Rollout


@dataclass
class BegunRollouts:
    """At most one step's; the same on every process.

    Attributes:
        step: whose responses were begun; None where none are.
        pairs: their prompts.
        rollouts: the responses, once waited for.
    """

    step: int | None = None
    pairs: Sequence[PromptPair] = ()
    rollouts: list[Rollout] = field(default_factory=list)

    def settle(self, engine: RolloutEngine, weight_version: int) -> None:
        """Wait for the responses, so that the engine is free for other requests; see ``RolloutEngine.finish``.

        Collectives: those of ``RolloutEngine.finish``.
        """
        if self.step is not None and not self.rollouts:
            self.rollouts = engine.finish(weight_version)

    def take(self, engine: RolloutEngine, weight_version: int) -> tuple[Sequence[PromptPair], list[Rollout]]:
        """Return prompts and responses, and forget them."""
        self.settle(engine, weight_version)
        taken = self.pairs, self.rollouts
        self.step, self.pairs, self.rollouts = None, (), []
        return taken
