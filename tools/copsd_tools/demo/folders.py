"""Where the demonstration writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Folders:
    """What the demonstration makes, below one folder."""

    out: Path

    @property
    def data(self) -> Path:
        return self.out / "data"

    @property
    def sft(self) -> Path:
        return self.out / "sft"

    @property
    def copsd(self) -> Path:
        return self.out / "copsd"

    @property
    def plot(self) -> Path:
        return self.out / "demo.png"

    @property
    def names(self) -> set[str]:
        """What stands in the folder when all is made."""
        return {part.name for part in (self.data, self.sft, self.copsd, self.plot)}
