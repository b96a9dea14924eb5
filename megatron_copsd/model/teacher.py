"""The teacher: whose weights it uses, and its hidden states on their way to the student.

Its weights are the initial ones, the student's current ones, or a moving average of them.

The teacher has no model of its own. Its weights are kept aside and put into the student's parameters for the length of
the teacher pass; ``live`` needs no copy at all. Where adapters are trained (``lora.rank``), only they ever change: the
frozen teacher is the model with its adapters switched off, and the average is one of the adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from megatron_copsd.config.schema import TeacherSettings
from megatron_copsd.data.batches.batching import NO_SAMPLE
from megatron_copsd.model.build import HiddenStatesModel
from megatron_copsd.model.lora import adapters_of, switched_off
from megatron_copsd.types import Microbatch

Weights = dict[str, torch.Tensor]


class TeacherWeights:
    """The teacher's weights beside the student's model.

    ``frozen`` keeps a copy in host memory in the model's dtype. ``ema`` keeps float32, on the model's device: in
    bfloat16 a decay of 0.999 would round every update away.
    """

    def __init__(self, chunks: Sequence[HiddenStatesModel], settings: TeacherSettings) -> None:
        """Take the current weights of a stage's chunks as the teacher's first ones."""
        self._chunks = chunks
        self._settings = settings
        self._kept: tuple[Weights, ...] = ()
        self._without_adapters = settings.weights == "frozen" and any(adapters_of(chunk) for chunk in chunks)
        if self._without_adapters:
            return
        if settings.weights == "frozen":
            self._kept = tuple(_on_host(chunk) for chunk in chunks)
        elif settings.weights == "ema":
            self._kept = tuple(_copy(chunk, torch.float32) for chunk in chunks)

    @property
    def tensors(self) -> tuple[Weights, ...]:
        """The kept weights of each chunk by local parameter name, for checkpoints; empty for ``live``."""
        return self._kept

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """Hold the teacher's weights in the model's parameters; the student's return afterwards, bit for bit."""
        if self._without_adapters:
            with switched_off(self._chunks):
                yield
            return
        if not self._kept:
            yield
            return
        aside = tuple(_copy(chunk, None) for chunk in self._chunks)
        try:
            self._fill(self._kept)
            yield
        finally:
            self._fill(aside)

    def output_weight(self) -> torch.Tensor | None:
        """Return the teacher's output weight [V_local, H], or None where it is the student's; last stage only.

        Call it inside ``in_model``.
        """
        last = self._chunks[-1]
        if not self._kept or not last.post_process or not last.output_weight.requires_grad:
            return None
        return last.output_weight.detach().clone()

    def update(self) -> None:
        """Move the average towards the student's weights; call once after each optimiser step."""
        if self._settings.weights != "ema":
            return
        for chunk, kept in zip(self._chunks, self._kept, strict=True):
            for name, parameter in _trained(chunk):
                kept[name].lerp_(parameter.detach().float(), 1.0 - self._settings.ema_decay)

    @torch.no_grad()
    def _fill(self, weights: Sequence[Weights]) -> None:
        for chunk, tensors in zip(self._chunks, weights, strict=True):
            for name, parameter in _trained(chunk):
                parameter.copy_(tensors[name], non_blocking=True)


def _copy(chunk: HiddenStatesModel, dtype: torch.dtype | None) -> Weights:
    return {name: p.detach().to(dtype=dtype, copy=True) for name, p in _trained(chunk)}


def _on_host(chunk: HiddenStatesModel) -> Weights:
    """Copies in page-locked memory, which every step reads at the speed of the bus."""
    return {
        name: torch.empty_like(p, device="cpu", pin_memory=p.is_cuda, requires_grad=False).copy_(p.detach())
        for name, p in _trained(chunk)
    }


def _trained(chunk: HiddenStatesModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in chunk.named_parameters() if parameter.requires_grad)


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
        self._finite: list[torch.Tensor] = []

    def are_finite(self) -> bool:
        """Whether all rows that were kept on this process are free of NaN and infinity."""
        return all(bool(part) for part in self._finite)

    def put(self, batch: Microbatch, rows: torch.Tensor) -> None:
        """Keep the rows of one of the teacher's microbatches, those of all context ranks: [R, H]."""
        self._finite.append(rows.isfinite().all())
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
