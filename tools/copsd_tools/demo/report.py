"""What the demonstration shows in the end: accuracies before and after, a plot, and where everything is."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from copsd_tools.command_line.terminal import number_table, say
from copsd_tools.demo.stages import Folders
from megatron_copsd.records.paths import RunFolder
from megatron_copsd.records.reader import Metrics

LANGUAGES = ("swahili", "english")


def accuracies(metrics: Metrics) -> dict[str, dict[int, float]]:
    """Return held-out accuracy in percent by language and step."""
    return {
        language: {step: 100 * share for step, share in metrics.evaluated(language, "accuracy").items()}
        for language in LANGUAGES
    }


def draw_plot(folders: Folders, metrics: Metrics) -> None:
    """Draw accuracy by language, and the loss, over the steps of the distillation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses = {line["step"]: line["loss"] for line in metrics.steps if "loss" in line}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for language, accuracy in accuracies(metrics).items():
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


def show(folders: Folders, metrics: Metrics, minutes: Mapping[str, float], seed: int) -> None:
    """Print accuracies before and after the distillation, minutes by stage, and where everything is."""
    table = number_table(f"Held-out accuracy, %, seed {seed}", ["language"], ["before COPSD", "after", "change"])
    for language, accuracy in accuracies(metrics).items():
        before, after = accuracy[min(accuracy)], accuracy[max(accuracy)]
        table.add_row(language.capitalize(), f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}")
    Console().print(table)
    say("minutes: " + ", ".join(f"{stage} {value:.1f}" for stage, value in minutes.items()))
    distilled = RunFolder(folders.copsd)
    places = {
        "problems": folders.data,
        "rollouts, with both prompts and per-token divergence": distilled.rollouts,
        "numbers": distilled.metrics,
        "TensorBoard": distilled.tensorboard,
        "checkpoints": distilled.checkpoints,
        "model before, Hugging Face folder": folders.sft / "hf",
        "model after, Hugging Face folder": folders.copsd / "hf",
        "plot": folders.plot,
    }
    for what, where in places.items():
        say(f"  {what}: {where}")
