"""What a run is called, what it leaves behind, and when."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from megatron_copsd.config.settings import NonNegativeInt, PathText, PositiveFloat, PositiveInt, Problem, Settings

if TYPE_CHECKING:
    from megatron_copsd.config.schema import Config


class RunSettings(Settings):
    """What the run is called, where it writes and how long it goes."""

    name: str = Field(default="copsd", min_length=1, description="name of the run, shown in logs and trackers")
    dir: PathText = Field(default="runs/copsd", description="folder of every artefact of the run")
    steps: Annotated[int, Field(ge=1, le=99_999_999)] = Field(default=100, description="optimiser steps")
    seed: NonNegativeInt = Field(default=0, description="seed of data order, sampling and initialisation")


class CheckpointSettings(Settings):
    """When the run's state is written and whether it continues from it."""

    save_every: NonNegativeInt = Field(default=50, description="steps between checkpoints; 0 saves only at the end")
    keep: PositiveInt = Field(default=2, description="newest checkpoints kept")
    resume: bool = Field(default=True, description="continue from the newest intact checkpoint in run.dir")
    save_on_signal: bool = Field(
        default=True, description="on Ctrl-C, SIGTERM or SIGHUP finish the step and save it; false: end at once"
    )


class LogSettings(Settings):
    """Where numbers go besides the screen and metrics.jsonl."""

    tensorboard: bool = Field(default=True, description="write TensorBoard events under run.dir")
    wandb_project: str | None = Field(default=None, description="Weights & Biases project; needs wandb installed")


class NeedSettings(Settings):
    """Something that a recipe reads and can't make."""

    paths: tuple[PathText, ...] = Field(
        ..., min_length=1, description="as other settings name them: files, folders or hub names"
    )
    kind: Literal["model", "dataset", "file"] = Field(..., description="model, dataset: a hub name may name it")
    source: str = Field(..., min_length=1, description="where it comes from")
    gb: PositiveFloat = Field(..., description="size of each in GB")
    licence: str = Field(..., min_length=1, description="its terms")


class ExpectedSettings(Settings):
    """A number that a recipe should come to."""

    source: str = Field(..., min_length=1, description="name in data.eval")
    metric: str = Field(default="accuracy", min_length=1, description="accuracy, pass@12, maj@12, ...")
    percent: Annotated[float, Field(ge=0, le=100)] = Field(..., description="its value")
    reported: str = Field(..., min_length=1, description="by whom: paper and table, or commit and seed")


class RecipeSettings(Settings):
    """What a file reproduces, for copsd reproduce; training reads none of it."""

    reproduces: str | None = Field(default=None, description="paper, version, table, row")
    needs: tuple[NeedSettings, ...] = Field(default=(), description="what has to be there")
    expected: tuple[ExpectedSettings, ...] = Field(default=(), description="what was reported")


def problems(config: Config) -> list[Problem]:
    """Return what is wrong with these sections in the light of the others."""
    found: list[Problem] = []
    if config.log.wandb_project and importlib.util.find_spec("wandb") is None:
        rule = "wandb is not installed"
        found.append(Problem("log.wandb_project", config.log.wandb_project, rule, "pip install wandb, or remove it."))
    sources = {source.label for source in config.data.eval}
    for i, one in enumerate(config.recipe.expected):
        if one.source not in sources:
            rule = f"is none of data.eval ({', '.join(sorted(sources)) or 'which is empty'})"
            found.append(Problem(f"recipe.expected.{i}.source", one.source, rule, "Name a source that is evaluated."))
    return found
