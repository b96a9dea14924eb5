"""What every section of the settings is made of: its base class, its types of numbers, and the form of a complaint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


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
