"""What a run measures on held-out data, and when it has learned enough: accuracy, loss, early stopping."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_copsd import platform
from megatron_copsd.config.sections.objective import Reduction
from megatron_copsd.evaluate.accuracy import evaluate_source
from megatron_copsd.methods.base import plain_samples
from megatron_copsd.methods.likelihood import trainer_log_probs
from megatron_copsd.model.passes import make_microbatches
from megatron_copsd.records.monitor import HELD_OUT_LOSS
from megatron_copsd.run import Run, sampling_for_evaluation
from megatron_copsd.types import PromptPair


def owes_evaluation(run: Run) -> bool:
    """Whether the step that the run begins from is still to be evaluated: a signal lets it be saved and no more.

    Collectives: one of a number.
    """
    settings, done = run.config.eval, run.steps_done
    if done == 0:
        return settings.at_start
    recorded = run.monitor is not None and run.monitor.has_evaluation(done)
    return settings.every > 0 and done % settings.every == 0 and not platform.largest(int(recorded))


def evaluate(run: Run, done: int) -> None:
    """Measure loss and accuracy on every held-out source under the current weights, and record them.

    Collectives: a forward-only schedule; those of the engine and of the weight sync.
    """
    numbers: dict[str, float] = {}
    if run.validation:
        numbers |= validation_losses(run)
        if run.monitor:
            run.monitor.say(f"step {done}: held-out loss {numbers[HELD_OUT_LOSS]:.4f}")
    if run.eval_pairs:
        settings = run.config.eval
        run.responses.free_engine(done)
        sampling = sampling_for_evaluation(run.config, run.stop_ids)
        for label, pairs in run.eval_pairs.items():
            report = evaluate_source(run.engine, pairs, sampling, settings.samples, run.config.run.seed)
            numbers |= {f"eval/{label}/{name}": value for name, value in report.numbers().items()}
            if run.monitor:
                run.monitor.say(f"step {done}: {label}: {report.summary()}")
    if run.monitor:
        run.monitor.numbers(done, numbers)


def validation_losses(run: Run) -> dict[str, float]:
    """Return the loss of the held-out responses, over all sources as training reduces it, and of each source.

    Collectives: a forward-only schedule; then one gathering.
    """
    items = [(label, item) for label, found in run.validation.items() for item in found]
    pairs, references = zip(*(item for _, item in items), strict=True)
    samples = plain_samples(pairs, references)
    batches = make_microbatches(samples, "student", run.config, run.model.layout, pad_id=run.stop_ids[0])
    log_probs = trainer_log_probs(run.model, run.ddp, batches, run.config, temperature=1.0)
    losses = [[-value for value in log_probs[sample.index]] for sample in samples]
    labels = [label for label, _ in items]
    reduction = run.config.loss.reduction
    numbers = {HELD_OUT_LOSS: reduced(losses, pairs, labels, reduction)}
    for label in run.validation:
        own = [number for number, name in enumerate(labels) if name == label]
        parts = [losses[i] for i in own], [pairs[i] for i in own], [label] * len(own)
        numbers[f"eval/{label}/loss"] = reduced(*parts, reduction)
    return numbers


def reduced(
    losses: Sequence[Sequence[float]], pairs: Sequence[PromptPair], labels: Sequence[str], reduction: Reduction
) -> float:
    """Reduce token losses of whole data as training does those of a step.

    Args:
        losses: of the tokens of each response.
        pairs: the response's prompts, whose problem names its subset.
        labels: of the response's source, which is the subset of a problem that names none.
        reduction: ``loss.reduction``.
    """
    if reduction == "token_mean":
        return math.fsum(value for one in losses for value in one) / sum(map(len, losses))
    groups: dict[str, list[float]] = {}
    for one, pair, label in zip(losses, pairs, labels, strict=True):
        name = (pair.problem.subset or label) if reduction == "subset_mean" else ""
        groups.setdefault(name, []).append(math.fsum(one) / len(one))
    return math.fsum(math.fsum(means) / len(means) for means in groups.values())


def best_step(losses: Sequence[tuple[int, float]]) -> int | None:
    """Return the first step with the lowest held-out loss; None without any that is finite."""
    finite = [(loss, step) for step, loss in losses if math.isfinite(loss)]
    return min(finite)[1] if finite else None


def evaluations_since_best(losses: Sequence[tuple[int, float]]) -> int:
    """Return how many evaluations have passed since the best one."""
    best = best_step(losses)
    return sum(best is None or step > best for step, _ in losses)


def best_of(run: Run) -> int:
    """Return the step with the lowest held-out loss so far, on every process; 0 without any.

    Collectives: one of a number, where held-out loss is measured.
    """
    if not run.validation:
        return 0
    return platform.largest((run.monitor and best_step(run.monitor.held_out_losses())) or 0)


def out_of_patience(run: Run) -> bool:
    """Whether so many evaluations in a row had no lower held-out loss that training is to stop; says so.

    Collectives: one of a number, where patience is limited.
    """
    patience = run.config.eval.patience
    if not patience:
        return False
    losses = run.monitor.held_out_losses() if run.monitor else []
    stop = platform.largest(int(evaluations_since_best(losses) >= patience))
    if stop and run.monitor:
        best = best_step(losses)
        kept = f"that of step {best}, whose checkpoint is kept (copsd export --step {best})" if best else "at the start"
        run.monitor.say(f"stopped early: {patience} evaluations without a lower held-out loss than {kept}")
    return bool(stop)
