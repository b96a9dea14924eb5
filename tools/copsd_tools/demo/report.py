"""What the demonstration shows in the end: accuracies before and after, a plot, and where everything is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from copsd_tools.command_line.terminal import number_table, say
from copsd_tools.demo.folders import Folders

LANGUAGES = ("swahili", "english")


def read_evaluations(run: Path) -> dict[str, dict[int, float]]:
    """Return accuracy in percent by language and step from a run's metrics.jsonl."""
    found: dict[str, dict[int, float]] = {language: {} for language in LANGUAGES}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        numbers = json.loads(line)
        for language in LANGUAGES:
            if f"eval/{language}/accuracy" in numbers:
                found[language][numbers["step"]] = 100 * numbers[f"eval/{language}/accuracy"]
    return found


def draw_plot(folders: Folders, evaluations: Mapping[str, Mapping[int, float]]) -> None:
    """Draw accuracy by language, and the loss, over the steps of the distillation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in (folders.copsd / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for language, accuracy in evaluations.items():
        left.plot(list(accuracy), list(accuracy.values()), marker="o", label=language.capitalize())
    left.set(xlabel="COPSD step", ylabel="held-out accuracy, %", ylim=(0, 102), title="200 unseen problems each")
    left.legend(loc="lower right")
    right.plot(list(losses), list(losses.values()), color="tab:gray")
    right.set(
        xlabel="COPSD step", ylabel="KL(teacher || student), nats per token", title="Loss on the model's own answers"
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folders.plot, dpi=120)


def show(
    folders: Folders, evaluations: Mapping[str, Mapping[int, float]], minutes: Mapping[str, float], seed: int
) -> None:
    """Print accuracies before and after the distillation, minutes by stage, and where everything is."""
    table = number_table(f"Held-out accuracy, %, seed {seed}", ["language"], ["before COPSD", "after", "change"])
    for language, accuracy in evaluations.items():
        before, after = accuracy[min(accuracy)], accuracy[max(accuracy)]
        table.add_row(language.capitalize(), f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}")
    Console().print(table)
    say("minutes: " + ", ".join(f"{stage} {value:.1f}" for stage, value in minutes.items()))
    places = {
        "problems": folders.data,
        "rollouts, with both prompts and per-token divergence": folders.copsd / "rollouts",
        "numbers": folders.copsd / "metrics.jsonl",
        "TensorBoard": folders.copsd / "tensorboard",
        "checkpoints": folders.copsd / "checkpoints",
        "model before, Hugging Face folder": folders.sft / "hf",
        "model after, Hugging Face folder": folders.copsd / "hf",
        "plot": folders.plot,
    }
    for what, where in places.items():
        say(f"  {what}: {where}")
