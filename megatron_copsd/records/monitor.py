"""Where a run shows itself: progress on the screen, metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_copsd.config.schema import Config
from megatron_copsd.records.paths import RunFolder
from megatron_copsd.types import StepResult


class Monitor:
    """Writes a run's numbers; made on the main process only.

    Each line of ``metrics.jsonl`` is one JSON object with ``step``. Training lines have ``loss``; evaluation lines have
    keys of the form ``eval/<source>/accuracy``.
    """

    def __init__(self, config: Config, folder: RunFolder, steps_done: int) -> None:
        """Open the outputs; lines of steps after ``steps_done``, left by a run that was stopped, are removed."""
        folder.begin()
        self.console = Console()
        _truncate(folder.metrics, steps_done)
        self._file = folder.metrics.open("a", encoding="utf-8")
        self._tensorboard = None
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder.tensorboard), purge_step=steps_done + 1)
        self._wandb = None
        if config.log.wandb_project:
            import wandb

            self._wandb = wandb.init(
                project=config.log.wandb_project, name=config.run.name, dir=str(folder.root), config=config.model_dump()
            )
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
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()
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
        """Record named numbers of a step everywhere."""
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(numbers), step=step)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _truncate(path: Path, steps_done: int) -> None:
    """Drop lines past ``steps_done`` and a last line cut short, so that a resumed run leaves one line a step."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError):
            continue
        if steps_done > 0 and step <= steps_done:
            kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)
