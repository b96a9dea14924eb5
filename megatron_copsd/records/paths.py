"""Where everything lies in a run's folder, and the version of the files' format."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_copsd.errors import UserError, describe
from megatron_copsd.records.disk import read_text, replace_text

FORMAT = 1
"""Version of metrics.jsonl and of the rollouts' files; a reader refuses a later one."""

_CHECKPOINT = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run.

    Attributes:
        root: ``run.dir``.
    """

    root: Path

    @property
    def config(self) -> Path:
        """The run's settings, defaults included."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, see ``reader.read_metrics``."""
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint."""
        return self.root / "checkpoints"

    @property
    def rollouts(self) -> Path:
        """One file for each step whose rollouts were written."""
        return self.root / "rollouts"

    @property
    def weights(self) -> Path:
        """Weights on their way to servers, where they go through files."""
        return self.root / "weights"

    @property
    def format(self) -> Path:
        """Says which version of the format the files have."""
        return self.root / "format.json"

    @property
    def lock(self) -> Path:
        """Held by the run that writes into the folder; see ``claim``."""
        return self.root / "run.lock"

    def bad_step(self, step: int) -> Path:
        """The batch of a step whose loss or gradient was not finite, as rollouts are written."""
        return self.root / "bad_steps" / f"step_{step:06d}.jsonl"

    def rollouts_of(self, step: int) -> Path:
        """The rollouts that a step was trained on, one JSON object a line."""
        return self.rollouts / f"step_{step:06d}.jsonl"

    def server_log(self, number: int) -> Path:
        """What the run's ``number``-th server printed."""
        return self.root / f"sglang_{number}.log"

    def complete_checkpoints(self) -> list[Path]:
        """The checkpoints that were written to the end, oldest first; one appears under its name only then."""
        found = self.checkpoints.glob("step_*") if self.checkpoints.is_dir() else ()
        return sorted((path for path in found if _CHECKPOINT.fullmatch(path.name)), key=step_of)

    def traces(self) -> list[Path]:
        """What an earlier run left here that a new one would replace."""
        left = (self.metrics, self.config, self.checkpoints, self.rollouts)
        return [path for path in left if path.exists()]

    def checkpoint_of(self, step: int) -> Path:
        """The checkpoint after so many steps."""
        return self.checkpoints / f"step_{step:08d}"

    def obstacles(self) -> list[str]:
        """Return what stands where the run is to write, and is not of the kind that a run would write there."""
        found = []
        for path, right, kind in (
            *((path, Path.is_file, "a file") for path in (self.config, self.metrics, self.format, self.lock)),
            *((path, Path.is_dir, "a folder") for path in (self.checkpoints, self.rollouts, self.tensorboard)),
        ):
            if os.path.lexists(path) and not right(path):
                rule = f"the run writes {kind} of this name, and something else is there"
                found.append(describe(str(path), path.name, rule, "Move it away."))
        return found

    def begin(self) -> None:
        """Make the folder, and say which format its files have."""
        self.root.mkdir(parents=True, exist_ok=True)
        replace_text(self.format, json.dumps({"format": FORMAT}) + "\n")

    def require_known_format(self) -> None:
        """Refuse what a later version wrote; a folder that does not say is of the first.

        Raises:
            UserError: the format is a later one, or the file that says so is not readable.
        """
        try:
            found = json.loads(read_text(self.format))["format"]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            rule = f"does not say the format of the run ({type(error).__name__})"
            raise UserError(
                describe(str(self.format), self.format.name, rule, "Restore or remove the file.")
            ) from error
        if found != FORMAT:
            rule = f"this version reads format {FORMAT}"
            raise UserError(describe(str(self.format), found, rule, "Read the run with the version that wrote it."))


def step_of(checkpoint: Path) -> int:
    """Return the number of steps that a checkpoint had done, from its name."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    assert match
    return int(match.group(1))
