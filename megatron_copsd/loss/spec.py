"""Which divergence the loss is, and what its gradient needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from copsd_kernels.reference import DivergenceKind
from copsd_kernels.rows import DivergenceTerms, RowSums
from megatron_copsd.errors import UserError, describe


@dataclass(frozen=True)
class DivergenceSpec:
    """Which divergence; the equations are those of ``copsd_kernels.reference.divergence``.

    Attributes:
        kind: forward_kl is KL(teacher||student), reverse_kl is KL(student||teacher), jsd lies between.
        jsd_weight: weight of the teacher in the mixture of jsd, in (0, 1).
        temperature: divides the logits of both; there is no temperature**2 factor.
        entry_clip: cap in nats of each vocabulary entry's contribution, before the sum.
        token_clip: cap in nats of a row's divergence, after the sum.
        teacher_top_k: the teacher's distribution is cut to its k likeliest tokens and divided by their mass; None takes
            all of it. What is cut off is reported.

    Raises:
        UserError: a value is out of range.
    """

    kind: DivergenceKind = "forward_kl"
    jsd_weight: float = 0.5
    temperature: float = 1.0
    entry_clip: float | None = None
    token_clip: float | None = None
    teacher_top_k: int | None = None

    def __post_init__(self) -> None:
        kinds = get_args(DivergenceKind)
        positive = "must be a positive number"
        top_k, top_k_rule = self.teacher_top_k, "must be a positive whole number or null"
        for name, valid, rule in (
            ("divergence", self.kind in kinds, f"must be one of {', '.join(kinds)}"),
            ("jsd_weight", 0 < _number(self.jsd_weight) < 1, "must be a number between 0 and 1, both excluded"),
            ("temperature", _number(self.temperature) > 0, positive),
            ("entry_clip", self.entry_clip is None or _number(self.entry_clip) > 0, f"{positive} or null"),
            ("token_clip", self.token_clip is None or _number(self.token_clip) > 0, f"{positive} or null"),
            ("teacher_top_k", top_k is None or (isinstance(top_k, int) and _number(top_k) > 0), top_k_rule),
        ):
            if not valid:
                value = self.kind if name == "divergence" else getattr(self, name)
                raise UserError(describe(f"loss.{name}", value, rule, "Change the setting."))
        if self.teacher_top_k is not None and self.kind == "reverse_kl":
            rule = "KL(student||teacher) is infinite where a cut teacher has no probability"
            raise UserError(describe("loss.teacher_top_k", self.teacher_top_k, rule, "Remove it, or use another."))

    @property
    def terms(self) -> DivergenceTerms:
        """What concerns the sum over the vocabulary."""
        return DivergenceTerms(self.kind, self.jsd_weight, self.temperature, self.entry_clip)

    @property
    def gradient_needs_sums(self) -> bool:
        """Whether a row's gradient depends on sums over the whole vocabulary besides the softmax normalisers."""
        return not self.terms.total_is_zero or self.token_clip is not None

    def scale(self, row_weights: Tensor, sums: RowSums | None) -> Tensor:
        """What multiplies each row's gradient with respect to the logits: weight / temperature, 0 for clipped rows.

        Args:
            row_weights: [C] float64.
            sums: of these rows over the whole vocabulary; needed where ``gradient_needs_sums``.

        Returns:
            [C] float64.
        """
        scale = row_weights / self.temperature
        if self.token_clip is None:
            return scale
        assert sums is not None
        return torch.where(sums.divergence <= self.token_clip, scale, 0)

    def total(self, sums: RowSums | None) -> Tensor | None:
        """S of each row, [C] float64, or None where it is 0; ``sums`` as for ``scale``."""
        if self.terms.total_is_zero:
            return None
        assert sums is not None
        return sums.total.contiguous()


def _number(value: object) -> float:
    """The value, or 0, which breaks the rules of all numbers here, for what is no finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if number else 0  # type: ignore[return-value]
