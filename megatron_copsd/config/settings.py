"""What every section of the settings is made of: its base class, its types of numbers, and the form of a complaint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, NamedTuple, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from megatron_copsd.config.paths import expanded

# Nothing that a run counts or is seeded with is larger, and libraries below would not take it.
PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
NonNegativeInt = Annotated[int, Field(ge=0, le=2**31 - 1)]
# How many of something exist at once, in lists of our own or as processes.
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Processes = Annotated[int, Field(ge=1, le=100_000)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=366 * 86_400)]
Mebibytes = Annotated[float, Field(gt=0, le=2**24)]
Decay = Annotated[float, Field(ge=0, lt=1)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(expanded)]


class Settings(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def parts(annotation: object) -> tuple[type[Settings] | None, str]:
    """Return the settings that a field is made of, and what stands before their names where it is a list: ".0"."""
    for choice in (annotation, *get_args(annotation)):
        if isinstance(choice, type) and issubclass(choice, Settings):
            return choice, ".0" if get_origin(annotation) is tuple else ""
    return None, ""


class Problem(NamedTuple):
    """A setting that does not go with another, or with what it names.

    Attributes:
        setting: as an override spells it, e.g. ``data.train.0.path``.
        value: what it is set to.
        rule: what is wrong with that.
        remedy: what to do.
    """

    setting: str
    value: object
    rule: str
    remedy: str


def without_effect(
    section: str, settings: Settings, names: Iterable[str], rule: str, remedy: str = "Remove it."
) -> list[Problem]:
    """Return a problem for each of the named settings that is set to something else than its default.

    A run writes down all its settings, and must be able to start from that file: to say the default is to say nothing.

    Args:
        section: name of the section, or of a source in a list.
        settings: its values.
        names: of the settings that have no effect.
        rule: why.
        remedy: what to do.
    """
    fields = type(settings).model_fields
    said = [name for name in names if getattr(settings, name) != fields[name].default]
    return [Problem(f"{section}.{name}", getattr(settings, name), f"has no effect {rule}", remedy) for name in said]
