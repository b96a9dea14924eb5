"""Whose weights the teacher uses: the initial ones, the student's current ones, or a moving average of them.

The teacher has no model of its own. Its weights are kept aside and put into the student's parameters for the length of
the teacher pass; ``live`` needs no copy at all. Where adapters are trained (``lora.rank``), only they ever change: the
frozen teacher is the model with its adapters switched off, and the average is one of the adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from megatron_copsd.config.schema import TeacherSettings
from megatron_copsd.model.build import HiddenStatesModel
from megatron_copsd.model.lora import adapters_of, switched_off


class TeacherWeights:
    """The teacher's weights beside the student's model.

    ``frozen`` keeps a copy in host memory in the model's dtype. ``ema`` keeps float32, on the model's device: in
    bfloat16 a decay of 0.999 would round every update away.
    """

    def __init__(self, model: HiddenStatesModel, settings: TeacherSettings) -> None:
        """Take the current weights of ``model`` as the teacher's first ones."""
        self._model = model
        self._settings = settings
        self._kept: dict[str, torch.Tensor] = {}
        self._without_adapters = settings.weights == "frozen" and bool(adapters_of(model))
        if self._without_adapters:
            return
        for name, parameter in self._trained().items():
            if settings.weights == "frozen":
                self._kept[name] = parameter.detach().to("cpu", copy=True)
            elif settings.weights == "ema":
                self._kept[name] = parameter.detach().to(torch.float32, copy=True)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The kept weights by local parameter name, for checkpoints; empty for ``live``."""
        return self._kept

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """Hold the teacher's weights in the model's parameters; the student's return afterwards, bit for bit."""
        if self._without_adapters:
            with switched_off(self._model):
                yield
            return
        if not self._kept:
            yield
            return
        parameters = self._trained()
        aside = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            self._fill(parameters, self._kept)
            yield
        finally:
            self._fill(parameters, aside)

    def output_weight(self) -> torch.Tensor | None:
        """Return the teacher's output weight [V_local, H], or None where it is the student's; last stage only.

        Call it inside ``in_model``.
        """
        if not self._kept or not self._model.post_process or not self._model.output_weight.requires_grad:
            return None
        return self._model.output_weight.detach().clone()

    def update(self) -> None:
        """Move the average towards the student's weights; call once after each optimiser step."""
        if self._settings.weights != "ema":
            return
        for name, parameter in self._trained().items():
            self._kept[name].lerp_(parameter.detach().float(), 1.0 - self._settings.ema_decay)

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self._model.named_parameters() if parameter.requires_grad}

    @staticmethod
    @torch.no_grad()
    def _fill(parameters: dict[str, torch.nn.Parameter], weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
