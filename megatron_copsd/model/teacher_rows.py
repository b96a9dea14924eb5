"""The teacher's hidden states at the response rows, from the teacher's microbatches to the student's."""

from __future__ import annotations

import torch

from megatron_copsd.data.batching import NO_SAMPLE
from megatron_copsd.types import Microbatch


class TeacherRows:
    """Response rows [R, H] by sample: teacher and student group the samples of a replica in different ways.

    Rows stay on the model's device up to a budget and lie in host memory from there on; which of the two changes no
    number. Only last stages have any.
    """

    def __init__(self, device_bytes: float) -> None:
        """Make an empty store.

        Args:
            device_bytes: budget on the model's device; 0 puts all rows into host memory, ``inf`` none.
        """
        self._device_bytes = device_bytes
        self._by_sample: dict[int, torch.Tensor] = {}

    def put(self, batch: Microbatch, rows: torch.Tensor) -> None:
        """Keep the rows of one of the teacher's microbatches, those of all context ranks: [R, H]."""
        size = rows.numel() * rows.element_size()
        if size > self._device_bytes:
            rows = _to_host(rows)
        else:
            self._device_bytes -= size
        parts = rows.split(batch.response_lengths)
        self._by_sample |= dict(zip(batch.sample_indices, parts, strict=True))

    def take(self, batch: Microbatch, hidden: torch.Tensor) -> torch.Tensor:
        """Return the rows of one of the student's microbatches, in its order, and forget them.

        Args:
            batch: the student's microbatch.
            hidden: the student's own rows of it, [R, H].

        Returns:
            [R, H], where and in the dtype that ``hidden`` is.
        """
        indices = [index for index in batch.sample_indices if index != NO_SAMPLE]
        parts = [self._by_sample.pop(index).to(hidden.device) for index in indices]
        whole = torch.cat(parts) if parts else hidden[:0]
        # A context rank has some of the student's rows only.
        return whole if len(whole) == len(hidden) else whole[batch.row_numbers.to(hidden.device)]


def _to_host(rows: torch.Tensor) -> torch.Tensor:
    """Copy to host memory; page-locked where a GPU reads it back."""
    if rows.device.type == "cpu":
        return rows
    return torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows)
