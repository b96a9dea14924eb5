"""Where a run shows itself: progress on the screen, metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_copsd.config.dump import dump_config, with_absolute_paths
from megatron_copsd.config.schema import Config
from megatron_copsd.records.disk import replace_text, writing
from megatron_copsd.records.paths import RunFolder
from megatron_copsd.records.reader import recorded_lines
from megatron_copsd.types import StepResult

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

HELD_OUT_LOSS = "eval/loss"
"""The loss of all held-out responses, in metrics."""


class Monitor:
    """Writes a run's numbers; made on the main process only.

    Each line of ``metrics.jsonl`` is one JSON object with ``step``. Training lines have ``loss``; evaluation lines have
    keys of the form ``eval/<source>/accuracy``.
    """

    def __init__(self, config: Config, folder: RunFolder, steps_done: int) -> None:
        """Nothing is written yet; ``steps_done`` is the step that the run continues from."""
        self.console = Console()
        self._config = config
        self._folder = folder
        self._steps_done = steps_done
        self._file: TextIO | None = None
        self._tensorboard: SummaryWriter | None = None
        self._wandb: Any = None
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            # A log file wants lines, not a bar redrawn ten times a second.
            disable=not self.console.is_terminal,
        )
        self._steps = config.run.steps
        self._task = self._progress.add_task(config.run.name, total=self._steps, completed=steps_done, status="")

    def __enter__(self) -> Monitor:
        """Open the outputs, when all that can fail before the first step has not.

        Lines of steps after ``steps_done``, left by a run that was stopped, are removed.

        Raises:
            UserError: a line is not one of them, or the disk is full, or refuses a file.
        """
        folder, config = self._folder, self._config
        kept = _lines_until(folder.metrics, self._steps_done)  # before anything is written: it may be refused
        with writing(folder.root):
            folder.begin()
            replace_text(folder.config, dump_config(with_absolute_paths(config)))
            replace_text(folder.metrics, kept)
            self._file = folder.metrics.open("a", encoding="utf-8")
            if config.log.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                threading.excepthook = _quiet_about_disks
                self._tensorboard = SummaryWriter(str(folder.tensorboard), purge_step=self._steps_done + 1)
        if config.log.wandb_project:
            import wandb

            self._wandb = wandb.init(
                project=config.log.wandb_project, name=config.run.name, dir=str(folder.root), config=config.model_dump()
            )
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()
        # What is still to be written can fail as well; the first error is the one to show.
        with suppress(OSError) if error else writing(self._folder.root):
            if self._file is not None:
                self._file.close()
            if self._tensorboard is not None:
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(error is not None))

    def step(self, result: StepResult) -> None:
        """Record one training step."""
        seconds = sum(result.seconds.values())
        rate = result.num_loss_tokens / seconds
        numbers: dict[str, float] = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "num_loss_tokens": result.num_loss_tokens,
            "tokens_per_second": rate,
        }
        numbers |= dict(result.metrics)
        if result.fault:
            numbers["skipped"] = 1
        numbers |= {f"seconds/{phase}": value for phase, value in result.seconds.items()}
        self.numbers(result.step, numbers)
        status = f"loss {result.loss:.4f}  {rate:,.0f} tok/s"
        self._progress.update(self._task, completed=result.step, status=status)
        if self._progress.disable:
            left = (self._steps - result.step) * seconds
            norm = f"grad {result.grad_norm:.3g}"
            print(
                f"step {result.step}/{self._steps}  {status}  {norm}  {seconds:.2f} s  ETA {left / 60:.1f} min",
                flush=True,
            )

    def numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record named numbers of a step everywhere; JSON knows no NaN and no infinity, and gets null.

        Raises:
            UserError: the disk is full, or refuses a file.
        """
        assert self._file is not None, "entered first"
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        with writing(self._folder.metrics):
            self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            with writing(self._folder.tensorboard):
                for name, value in numbers.items():
                    self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(numbers), step=step)

    def held_out_losses(self) -> list[tuple[int, float]]:
        """Return the held-out loss of each step that has one, in order; infinity where it was not finite."""
        lines = [line for line in recorded_lines(self._folder.metrics) if HELD_OUT_LOSS in line]
        return [(line["step"], math.inf if line[HELD_OUT_LOSS] is None else line[HELD_OUT_LOSS]) for line in lines]

    def has_evaluation(self, step: int) -> bool:
        """Whether the numbers of an evaluation after so many steps are recorded."""
        lines = recorded_lines(self._folder.metrics)
        return any(line["step"] == step and any(key.startswith("eval/") for key in line) for line in lines)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _quiet_about_disks(failed: threading.ExceptHookArgs) -> None:
    """Say nothing of a thread that the disk refused: TensorBoard's next call raises what its thread met."""
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


def _lines_until(path: Path, steps_done: int) -> str:
    """The lines up to a step, without a last one cut short, so that a resumed run leaves one line a step."""
    return "".join(json.dumps(line) + "\n" for line in recorded_lines(path) if 0 < steps_done >= line["step"])
