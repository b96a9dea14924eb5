"""Commands that run others, one after the other."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_copsd.signals import run_apart

Words = Sequence[object]
"""A command of ``copsd``, without the ``copsd``."""


def run_command(command: Words) -> None:
    """Run a command in a process of its own, and say it; ends this one with its exit code where it fails."""
    words = [str(word) for word in command]
    print(f"\n$ copsd {' '.join(words)}", flush=True)
    code = run_apart([sys.executable, "-m", "copsd_tools.cli", *words], "what runs is asked to end")
    if code:
        sys.exit(code)  # the command has said why
