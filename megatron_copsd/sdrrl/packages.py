"""Packages that some settings need and that are not installed by default."""

from __future__ import annotations

import importlib
from types import ModuleType

from megatron_copsd.errors import UserError, describe


def package(module: str, name: str, setting: str, otherwise: str) -> ModuleType:
    """Import a package.

    Args:
        module: its import name.
        name: what ``pip install`` calls it.
        setting: the section whose ``name`` asks for it.
        otherwise: what to do without it.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        rule = f"the package {name} is not installed ({error})"
        raise UserError(describe(f"{setting}.name", module, rule, f"pip install {name}. {otherwise}")) from error
