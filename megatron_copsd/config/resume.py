"""Which settings may change when a run is continued: some are refused, some are said, some change no number.

Nothing that a continued run does depends on the settings it began with, but for the state in its checkpoint: whatever
is not refused here takes effect from the next step on. The learning rate is a function of the settings and the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from megatron_copsd.config.schema import Config

REFUSED: Mapping[str, str] = {
    "run.seed": "the order of problems and all sampling follow from it: some would come twice and others never",
    "rollout.prompts_per_step": "which problems a step draws follows from it: some would come twice and others never",
    "objective.name": "it is another training",
    "loss.reduction": "it is another objective, and held-out losses of before could not be compared",
    "data.validation": "held-out losses of before could not be compared",
    "model.dtype": "the checkpoint keeps weights and optimiser state as this dtype needs them",
    "optimizer.distributed": "the checkpoint keeps the optimiser's state in the one form or the other",
    "teacher.weights": "the checkpoint keeps the weights of this teacher and no other",
    "lora": "the checkpoint keeps adapters of this shape",
}
"""Settings, or sections, of which a difference is refused, and why."""

WITHOUT_EFFECT = (
    "run.name",
    "run.dir",
    "run.steps",
    "model.path",  # what it leads to is compared by content
    "model.revision",
    "model.implementation",
    "parallel",
    "sglang",
    "checkpoint",
    "eval",
    "log",
    "data.eval",
    "loss.implementation",
    "loss.recompute",
    "loss.scratch_mb",
    "optimizer.micro_batch_size",
    "optimizer.micro_batch_tokens",
    "optimizer.teacher_micro_batch_size",
    "optimizer.teacher_micro_batch_tokens",
    "optimizer.packing",
    "optimizer.skip_nonfinite",
    "teacher.cache",
    "teacher.cache_mb",
    "rollout.batch_size",
    "rollout.bucket_mb",
    "rollout.save_every",
    "rollout.agreement_every",
    "rollout.agreement_limit",
    "rollout.agreement_failure",
    "recipe",
    "sdrrl",  # how data were made; training reads what is there
)
"""Settings, or sections, that change nothing that is trained; of any other a difference is allowed, and said."""


class Change(NamedTuple):
    """A setting that differs from what a checkpoint was trained with.

    Attributes:
        setting: as an override spells it.
        before, after: values, as JSON has them.
        refused: why it can't be changed; None where it can.
    """

    setting: str
    before: object
    after: object
    refused: str | None


def changes(before: Mapping[str, Any], config: Config) -> list[Change]:
    """Return what of a configuration differs from the settings of a checkpoint, in the order of the sections.

    Args:
        before: ``Config.model_dump(mode="json")`` of then; what it lacks is not compared.
        config: of now.
    """
    then = dict(_flat(before, ""))
    return [
        Change(setting, then[setting], after, _lookup(setting, REFUSED))
        for setting, after in _flat(config.model_dump(mode="json"), "")
        if setting in then and then[setting] != after and _lookup(setting, dict.fromkeys(WITHOUT_EFFECT, "")) is None
    ]


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _lookup(setting: str, table: Mapping[str, str]) -> str | None:
    """Return what a table says of a setting or of its section."""
    return table.get(setting, table.get(setting.partition(".")[0]))
