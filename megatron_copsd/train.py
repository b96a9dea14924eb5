"""The training loop and one step, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_copsd import platform
from megatron_copsd.errors import UserError, describe
from megatron_copsd.measure.agreement import log_prob_agreement
from megatron_copsd.measure.evaluation import best_of, evaluate, out_of_patience, owes_evaluation
from megatron_copsd.measure.reports import count_loss_tokens, fault_before_update, reduce_reports, step_result
from megatron_copsd.methods.base import RowReport, output_head
from megatron_copsd.model import checkpoint
from megatron_copsd.model.context import by_sample, whole_rows
from megatron_copsd.model.optimizer import Update
from megatron_copsd.model.passes import RowLoss, forward_pass, make_microbatches, student_pass
from megatron_copsd.model.teacher import TeacherRows
from megatron_copsd.records.rollouts import write_rollouts
from megatron_copsd.run import Run
from megatron_copsd.signals import StopRequest
from megatron_copsd.types import Microbatch, Sample, StepResult, View


def train(run: Run, request: StopRequest | None = None) -> int:
    """Train to ``run.steps``: step, evaluate, save.

    Args:
        run: the run.
        request: looked at after each step; without one, nobody asks the run to stop.

    Returns:
        0, or the signal for which the run has stopped after a step that it has saved.

    Raises:
        UserError: more steps than allowed had a loss or gradient that was not finite.
    """
    config = run.config
    if owes_evaluation(run):
        evaluate(run, run.steps_done)
    if out_of_patience(run):
        return 0
    best, skipped = best_of(run), 0
    for done in range(run.steps_done, config.run.steps):
        result = train_step(run, done)
        if run.monitor:
            run.monitor.step(result)
        if result.fault:
            skipped += 1
            refuse_or_skip(run, result, skipped)
        last = result.step == config.run.steps
        stopping = 0 if last else asked_to_stop(request)
        enough = False
        if not stopping and (_due(result.step, config.eval.every) or (last and config.eval.at_end)):
            evaluate(run, result.step)
            best, enough = best_of(run), out_of_patience(run)
            stopping = 0 if last else asked_to_stop(request)
        if stopping or last or enough or best == result.step or _due(result.step, config.checkpoint.save_every):
            save(run, result.step, best)
        if stopping or enough:
            return stopping
    return 0


def asked_to_stop(request: StopRequest | None) -> int:
    """Return the signal that asked any process to stop, or 0.

    Collectives: one of a number.
    """
    return platform.largest(request.number if request else 0)


def train_step(run: Run, done: int) -> StepResult:
    """Do one optimiser step, the ``done + 1``-th: roll out, teach, learn, update."""
    seconds: dict[str, float] = {}
    with _timed(seconds, "rollout"):
        samples = make_samples(run, done)
    batches = microbatches(run, samples, "student")
    agreement: dict[str, float] = {}
    if run.method.traits.samples_responses and _due(done + 1, run.config.rollout.agreement_every):
        with _timed(seconds, "agreement"):
            agreement = log_prob_agreement(run, done, samples, batches)

    teacher_rows = teacher_weight = None
    if run.method.traits.uses_teacher:
        with _timed(seconds, "teacher"), run.teacher.in_model():
            teacher_rows = teach(run, microbatches(run, samples, "teacher"))
            teacher_weight = run.teacher.output_weight()

    with _timed(seconds, "student"):
        reports = learn(run, samples, batches, teacher_rows, teacher_weight)
    losses = reduce_reports(run.model.layout, reports, count_loss_tokens(samples))
    with _timed(seconds, "update"):
        update, fault = apply(run, done + 1, fault_before_update(losses[0], teacher_rows))

    if fault or (run.method.traits.samples_responses and _due(done + 1, run.config.rollout.save_every)):
        save_rollouts(run, done + 1, samples, batches, reports, faulty=fault is not None)
    return step_result(run, done, samples, losses, update, fault, agreement, seconds)


def make_samples(run: Run, done: int) -> list[Sample]:
    """Give the step's problems their responses and make samples of them, the same on every process.

    Collectives: those of the engine and of the weight sync.
    """
    return run.method.make_samples(*run.responses.take(done))


def microbatches(run: Run, samples: Sequence[Sample], view: View) -> list[Microbatch]:
    """Cut the global batch into this replica's microbatches of one view."""
    return make_microbatches(samples, view, run.config, run.model.layout, pad_id=run.stop_ids[0])


def teach(run: Run, batches: Sequence[Microbatch]) -> TeacherRows:
    """Have the model, which holds the teacher's weights, give the hidden states that the student learns from.

    Collectives: a forward-only schedule.
    """
    rows = TeacherRows(run.config.teacher.device_cache_bytes)

    def keep(index: int, hidden: torch.Tensor) -> None:
        rows.put(batches[index], whole_rows(batches[index], hidden, run.model.layout.context_group))

    forward_pass(run.ddp, batches, keep)
    return rows


def learn(
    run: Run,
    samples: Sequence[Sample],
    batches: Sequence[Microbatch],
    teacher_rows: TeacherRows | None,
    teacher_weight: torch.Tensor | None,
) -> list[RowReport]:
    """Accumulate the gradient of the method's loss over the replica's microbatches; reports come on the last stage.

    Collectives: the pipeline schedule, and the gradient reductions.
    """
    for chunk in run.ddp:
        chunk.zero_grad_buffer()
    run.optimization.optimizer.zero_grad()

    def row_loss(index: int, hidden: torch.Tensor) -> RowLoss[RowReport]:
        teacher_hidden = teacher_rows.take(batches[index], hidden) if teacher_rows else None
        head = output_head(run.model, run.config, teacher_weight)
        return RowLoss(*run.method.row_loss(hidden, batches[index], head, teacher_hidden))

    positions = sum(len(sample.pair.student_prompt) + len(sample.rollout.response) for sample in samples)
    return student_pass(run.ddp, batches, row_loss, positions)


def apply(run: Run, step: int, fault: str | None) -> tuple[Update, str | None]:
    """Update the weights by the accumulated gradient unless something is not finite; returns why not, or None.

    Collectives: those of the optimiser.
    """
    update = run.optimization.step(step, held=fault is not None)
    if update.applied:
        run.teacher.update()
    elif fault is None:
        fault = f"the gradient's norm is {update.grad_norm}"
    return update, fault


def refuse_or_skip(run: Run, result: StepResult, skipped: int) -> None:
    """Go on after a step that was not applied, or stop; ``skipped`` steps were not, this one included.

    Raises:
        UserError: more than ``optimizer.skip_nonfinite``.
    """
    allowed = run.config.optimizer.skip_nonfinite
    batch = run.folder.bad_step(result.step)
    if skipped > allowed:
        rule = f"{result.fault} at step {result.step}, which was not applied; its batch is in {batch}"
        remedy = (
            "Earlier checkpoints are as they were. Lower optimizer.lr or look at the batch, and start again; "
            f"optimizer.skip_nonfinite={allowed + 1} would pass over it."
        )
        raise UserError(describe("optimizer.skip_nonfinite", allowed, rule, remedy))
    if run.monitor:
        run.monitor.say(f"step {result.step}: passed over: {result.fault}; its batch is in {batch}")


def save(run: Run, done: int, best: int) -> None:
    """Write a checkpoint that appears only when complete, and drop the oldest, but for that of step ``best``.

    Collectives: those of the checkpoint.
    """
    state = checkpoint.TrainingState(run.model, run.optimization, run.teacher, done)
    folder = checkpoint.save(run.folder, state, run.origin, run.config.checkpoint.keep, best)
    if run.monitor:
        run.monitor.say(f"step {done}: saved {folder}")


def save_rollouts(
    run: Run,
    step: int,
    samples: Sequence[Sample],
    batches: Sequence[Microbatch],
    reports: Sequence[RowReport],
    *,
    faulty: bool,
) -> None:
    """Record the step's rollouts with the loss of every token, those of a step that was not applied apart.

    Collectives: those of ``by_sample``.
    """
    token_losses = by_sample(run.model.layout, batches, [report.token_losses for report in reports])
    path = run.folder.bad_step(step) if faulty else run.folder.rollouts_of(step)
    write_rollouts(path, step, samples, token_losses, run.tokenizer)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[phase] = time.perf_counter() - start
