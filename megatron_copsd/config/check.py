"""Rules that tie several settings together, and files that must exist; all are checked before anything starts.

The rules themselves stand beside the fields that they are about, in ``sections/``.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_copsd.config.load import LoadedConfig
from megatron_copsd.config.sections import data, model, objective, optimizer, rollout, run, sglang
from megatron_copsd.config.sections.model import expert_problems, size_problems
from megatron_copsd.config.sections.sglang import check_nodes
from megatron_copsd.config.settings import Problem
from megatron_copsd.errors import UserError, describe

__all__ = ["check", "check_nodes", "expert_problems", "size_problems"]

_SECTIONS = (run, model, data, rollout, sglang, objective, optimizer)


def check(loaded: LoadedConfig) -> list[str]:
    """Refuse combinations that can't work, and settings that contradict what else is set.

    Returns:
        What the user should be told: settings that have no effect in a training as the others are, one a line.

    Raises:
        UserError: with every problem found, one a line.
    """
    found = [problem for section in _SECTIONS for problem in section.problems(loaded.config)]
    if found:
        raise UserError("\n".join(_said(loaded, found)))
    idle = [*optimizer.idle(loaded.config), *rollout.idle(loaded.config), *sglang.idle(loaded.config)]
    return _said(loaded, idle)


def _said(loaded: LoadedConfig, problems: Sequence[Problem]) -> list[str]:
    named = loaded.places.named
    return [describe(named(setting), value, rule, remedy) for setting, value, rule, remedy in problems]
