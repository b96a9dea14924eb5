"""Rules that tie several settings together, and files that must exist; all are checked before anything starts.

The rules themselves stand beside the fields that they are about, in ``sections/``.
"""

from __future__ import annotations

from megatron_copsd.config.load import LoadedConfig
from megatron_copsd.config.sections import data, model, objective, optimizer, rollout, run, sglang
from megatron_copsd.config.sections.model import expert_problems
from megatron_copsd.config.sections.sglang import check_nodes
from megatron_copsd.errors import UserError, describe

__all__ = ["check", "check_nodes", "expert_problems"]

_SECTIONS = (run, model, data, rollout, sglang, objective, optimizer)


def check(loaded: LoadedConfig) -> None:
    """Refuse combinations that can't work.

    Raises:
        UserError: with every problem found, one a line.
    """
    found = [problem for section in _SECTIONS for problem in section.problems(loaded.config)]
    if found:
        raise UserError("\n".join(describe(loaded.places.named(setting), *rest) for setting, *rest in found))
