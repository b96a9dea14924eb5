"""What public functions check of their arguments: a call that breaks a rule ends in one error, before any work.

Only shapes, dtypes, strides and plain numbers are looked at: reading a value on a device would have the host wait for
it. A kernel that is launched on arguments of the wrong shape does not fail; it reads beyond them.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NoReturn

import torch
from torch import Tensor

from megatron_copsd.errors import UserError, describe

FLOATING = (torch.float32, torch.bfloat16, torch.float64)
EXACT = (torch.float32, torch.float64)


class Arguments:
    """The arguments of one call, checked one after another.

    Shapes are written in the letters of the docstrings, as in ``R H``. The first tensor that has a letter says its
    size; the first tensor of a call says the device of all.
    """

    def __init__(self, function: str) -> None:
        self._function = function
        self._sizes: dict[str, tuple[int, str]] = {}
        self._device: tuple[torch.device, str] | None = None

    def refuse(self, name: str, value: object, rule: str, remedy: str) -> NoReturn:
        """Raise the error of one argument."""
        value = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else value
        raise UserError(describe(f"{self._function}: {name}", value, rule, remedy))

    def tensor(
        self,
        name: str,
        value: object,
        shape: str,
        dtypes: Collection[torch.dtype],
        *,
        constant: bool = False,
        unit_stride: bool = False,
    ) -> None:
        """Check that ``value`` is a tensor of this shape, one of these dtypes, and on the device of the others.

        Args:
            name: of the argument.
            value: what was given.
            shape: a letter, or a number, for each dimension.
            dtypes: those it may have.
            constant: refuse one that wants a gradient, which it would not get.
            unit_stride: elements of the last dimension lie side by side, as kernels read them.

        Raises:
            UserError: it is not.
        """
        if not isinstance(value, Tensor):
            self.refuse(name, value, f"must be a tensor [{shape}], not {type(value).__name__}", "Pass a tensor.")
        letters = shape.split()
        found = tuple(value.shape)
        if len(found) != len(letters):
            self.refuse(name, found, f"must have the shape [{shape}]", "Pass a tensor of that shape.")
        for letter, size in zip(letters, found, strict=True):
            wanted, origin = (int(letter), shape) if letter.isdigit() else self._sizes.setdefault(letter, (size, name))
            if size != wanted:
                rule = f"must have the shape [{shape}] with {letter} = {wanted}, as {origin} has it"
                self.refuse(name, found, rule, "Pass tensors of one call only.")
        if value.dtype not in dtypes:
            allowed = " or ".join(str(dtype) for dtype in dtypes)
            self.refuse(name, value.dtype, f"must be {allowed}", "Convert it with Tensor.to.")
        device, first = self._device = self._device or (value.device, name)
        if value.device != device:
            self.refuse(name, str(value.device), f"must be on {device}, as {first} is", "Move it with Tensor.to.")
        if constant and value.requires_grad and torch.is_grad_enabled():
            self.refuse(name, "requires_grad", "is a constant: no gradient is made for it", "Detach it.")
        if unit_stride and value.numel() > 1 and value.shape[-1] > 1 and value.stride(-1) != 1:
            rule = "elements of the last dimension must lie side by side"
            self.refuse(name, value.stride(), rule, "Pass Tensor.contiguous().")

    def fix(self, letter: str, size: int, name: str) -> None:
        """Say what a letter stands for, and which argument has it so."""
        self._sizes[letter] = size, name

    def size(self, letter: str) -> int:
        """Return what a letter of the shapes stands for."""
        return self._sizes[letter][0]

    def number(self, name: str, value: object, below: float = math.inf) -> None:
        """Check for a number above 0 and below ``below``."""
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < below:
            return
        upper = "" if below == math.inf else f" below {below}"
        self.refuse(name, value, f"must be a positive number{upper}", "Pass one.")

    def integer(self, name: str, value: object, least: int, most: int | None = None) -> None:
        """Check for a whole number in a range, both ends included."""
        if (
            isinstance(value, int)
            and not isinstance(value, bool)
            and least <= value
            and (most is None or value <= most)
        ):
            return
        upper = "" if most is None else f" and at most {most}"
        self.refuse(name, value, f"must be a whole number of at least {least}{upper}", "Pass one.")

    def instance(self, name: str, value: object, kind: type) -> None:
        """Check for an object of this class."""
        if not isinstance(value, kind):
            self.refuse(name, type(value).__name__, f"must be a {kind.__name__}", f"Pass a {kind.__name__}.")

    def choice(self, name: str, value: object, choices: Collection[str]) -> None:
        """Check for one of these words."""
        if not isinstance(value, str) or value not in choices:
            self.refuse(name, value, f"must be one of {', '.join(choices)}", "Pass one of these.")
