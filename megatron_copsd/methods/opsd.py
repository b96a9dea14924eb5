"""OPSD (arXiv 2601.18734): COPSD's step, with a teacher that sees the reference solution and no translation."""

from __future__ import annotations

from megatron_copsd.config.method import TRAITS
from megatron_copsd.methods.copsd import Copsd


class Opsd(Copsd):
    """Full-vocabulary divergence towards a teacher that reads the problem as the student does, and its solution."""

    traits = TRAITS["opsd"]
