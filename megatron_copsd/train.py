"""The training loop and one step, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_copsd.data.batching import microbatch, row_weights
from megatron_copsd.data.context import cut_for_context, sequence_multiple
from megatron_copsd.data.items import TrainItem
from megatron_copsd.data.partition import group_samples, grouping, share_samples
from megatron_copsd.evaluate.accuracy import evaluate_source
from megatron_copsd.loss.gradients import GradientOptions
from megatron_copsd.measure.agreement import log_prob_agreement, probe_log_probs, probe_samples
from megatron_copsd.measure.reports import by_sample, reduce_reports, rollout_metrics
from megatron_copsd.measure.throughput import count_flops, throughput_metrics
from megatron_copsd.methods.base import OutputHead, RowReport
from megatron_copsd.model import checkpoint
from megatron_copsd.model.context import whole_rows
from megatron_copsd.model.experts import announce_positions
from megatron_copsd.model.gather import iter_hf_tensors
from megatron_copsd.model.passes import RowLoss, forward_pass, student_pass
from megatron_copsd.model.teacher import TeacherRows
from megatron_copsd.records.rollouts import write_rollouts
from megatron_copsd.rollout.collect import rollout_seed
from megatron_copsd.rollout.engine import Bucket, Probe, Request, Sampling
from megatron_copsd.run import Run, sampling_for_evaluation
from megatron_copsd.sync.buckets import in_buckets
from megatron_copsd.types import Microbatch, PromptPair, Rollout, Sample, StepResult, View

MIB = 2**20


def train(run: Run) -> None:
    """Train to ``run.steps``: step, evaluate, save."""
    config = run.config
    if run.steps_done == 0 and config.eval.at_start:
        evaluate(run, 0)
    for done in range(run.steps_done, config.run.steps):
        result = train_step(run, done)
        if run.monitor:
            run.monitor.step(result)
        last = result.step == config.run.steps
        if _due(result.step, config.eval.every) or (last and config.eval.at_end):
            evaluate(run, result.step)
        if last or _due(result.step, config.checkpoint.save_every):
            save(run, result.step)


def train_step(run: Run, done: int) -> StepResult:
    """Do one optimiser step, the ``done + 1``-th: roll out, teach, learn, update."""
    seconds: dict[str, float] = {}
    with _timed(seconds, "rollout"):
        samples = make_samples(run, done)
        run.engine.rest()
    num_tokens = sum(len(sample.rollout.response) for sample in samples)
    student_batches = make_microbatches(run, samples, "student")
    agreement: dict[str, float] = {}
    if _due(done + 1, run.config.rollout.agreement_every) and run.method.traits.samples_responses:
        with _timed(seconds, "agreement"):
            agreement = log_prob_agreement(run, done, samples, student_batches)

    teacher_rows = teacher_weight = None
    if run.method.traits.uses_teacher:
        with _timed(seconds, "teacher"), run.teacher.in_model():
            teacher_rows = teach(run, make_microbatches(run, samples, "teacher"))
            teacher_weight = run.teacher.output_weight()

    with _timed(seconds, "student"):
        announce_positions(run.chunks, sum(len(s.pair.student_prompt) + len(s.rollout.response) for s in samples))
        reports = learn(run, student_batches, teacher_rows, teacher_weight)
    with _timed(seconds, "update"):
        grad_norm, learning_rate = run.optimization.step()
        run.teacher.update()

    loss, row_means = reduce_reports(run.layout, reports, num_tokens)
    row_means |= agreement
    flops = count_flops(run.architecture, samples, run.method.traits.uses_teacher, run.config)
    row_means |= throughput_metrics(flops, num_tokens, seconds, run.platform.device)
    if run.method.traits.samples_responses:
        row_means |= rollout_metrics(samples, done)
        if _due(done + 1, run.config.rollout.save_every):
            token_losses = by_sample(run.layout, student_batches, [report.token_losses for report in reports])
            write_rollouts(run.folder, done + 1, samples, token_losses, run.tokenizer)
    return StepResult(done + 1, loss, grad_norm, learning_rate, num_tokens, row_means, seconds)


def make_samples(run: Run, done: int) -> list[Sample]:
    """Give the step's problems their responses: from the engine, or from the data when supervised.

    Every process returns the same samples.
    """
    if run.method.traits.samples_responses:
        pairs, rollouts = roll_out(run, done)
    else:
        pairs, rollouts = zip(*draw(run, done), strict=True)
    return run.method.make_samples(pairs, rollouts)


def draw(run: Run, step: int) -> list[TrainItem]:
    """Return the problems of a step: prompts, and the reference response where there is one."""
    taken = run.sampler.take(step, run.config.rollout.prompts_per_step)
    return [run.train_items[source][row] for source, row in taken]


def roll_out(run: Run, done: int) -> tuple[Sequence[PromptPair], list[Rollout]]:
    """Have the step's responses sampled; under ``rollout.ahead`` they were begun a step ago, and the next are now.

    With ``sglang.pause`` the newest weights reach even the responses that are being sampled.

    Collectives: the weight sync, and gathering the rollouts.
    """
    ahead = run.config.rollout.ahead
    if run.begun.step != done:
        begin_rollouts(run, done)
    elif run.config.sglang.pause != "wait":
        sync_weights(run, done)
    pairs, rollouts = run.begun.take(run.engine, weight_version=done)
    if ahead and done + 1 < run.config.run.steps:
        begin_rollouts(run, done + 1, weight_version=done)
    return pairs, rollouts


def begin_rollouts(run: Run, step: int, weight_version: int | None = None) -> None:
    """Give the engine the trainer's current weights and the requests of a step."""
    settings = run.config.rollout
    sync_weights(run, step if weight_version is None else weight_version)
    pairs = [pair for pair, _ in draw(run, step) for _ in range(settings.samples_per_prompt)]
    sampling = Sampling(
        settings.temperature, settings.top_p, settings.top_k, settings.max_response_tokens, run.stop_ids
    )
    requests = [
        Request(pair.student_prompt, rollout_seed(run.config.run.seed, step, index)) for index, pair in enumerate(pairs)
    ]
    run.engine.begin(requests, sampling)
    run.begun.step, run.begun.pairs = step, pairs


def sync_weights(run: Run, weight_version: int) -> None:
    """Give the engine the trainer's weights, unless it has them.

    Collectives: gathers every parameter over tensor and pipeline ranks.
    """
    if run.engine.weight_version == weight_version:
        return

    def source() -> Iterator[Bucket]:
        tensors = iter_hf_tensors(run.chunks, run.architecture, *run.layout.weight_groups)
        return in_buckets(tensors, int(run.config.rollout.bucket_mb * MIB))

    def probes() -> Sequence[Probe]:
        samples = probe_samples(run)
        return probe_log_probs(run, samples, make_microbatches(run, samples, "student"))

    by_probes = run.config.rollout.engine == "sglang" and run.config.sglang.verify == "logprobs"
    run.engine.update_weights(source, weight_version, probes if by_probes else None)


def make_microbatches(run: Run, samples: Sequence[Sample], view: View) -> list[Microbatch]:
    """Cut the global batch into this replica's microbatches of one view; both views have the same samples."""
    layout, optimizer = run.layout, run.config.optimizer
    num_tokens = sum(len(sample.rollout.response) for sample in samples)
    by_tokens = optimizer.micro_batch_tokens is not None
    shares = share_samples(samples, layout.data_size, by_tokens=by_tokens, with_teacher=run.method.traits.uses_teacher)
    groups = group_samples(shares, view, grouping(optimizer, view), layout.microbatch_multiple)[layout.data_rank]
    weights = [row_weights(part, run.config.loss.reduction, num_tokens, len(samples)) for part in groups]
    multiple = sequence_multiple(layout.context_size)
    # Any valid id pads: masks come from lengths, never from ids.
    whole = [
        microbatch(part, view, run.stop_ids[0], w, layout.length_multiple * multiple, optimizer.packing, multiple)
        for part, w in zip(groups, weights, strict=True)
    ]
    return [cut_for_context(batch, layout.context_rank, layout.context_size) for batch in whole]


def teach(run: Run, batches: Sequence[Microbatch]) -> TeacherRows:
    """Have the model, which holds the teacher's weights, give the hidden states that the student learns from."""
    rows = TeacherRows(run.config.teacher.device_cache_bytes)

    def keep(index: int, hidden: torch.Tensor) -> None:
        rows.put(batches[index], whole_rows(batches[index], hidden, run.layout.context_group))

    forward_pass(run.ddp, batches, keep)
    return rows


def learn(
    run: Run,
    batches: Sequence[Microbatch],
    teacher_rows: TeacherRows | None,
    teacher_weight: torch.Tensor | None,
) -> list[RowReport]:
    """Accumulate the gradient of the objective over the replica's microbatches; reports come back on the last stage."""
    for chunk in run.ddp:
        chunk.zero_grad_buffer()
    run.optimization.optimizer.zero_grad()

    def row_loss(index: int, hidden: torch.Tensor) -> RowLoss[RowReport]:
        teacher_hidden = teacher_rows.take(batches[index], hidden) if teacher_rows else None
        return RowLoss(*run.method.row_loss(hidden, batches[index], output_head(run, teacher_weight), teacher_hidden))

    return student_pass(run.ddp, batches, row_loss)


def output_head(run: Run, teacher_weight: torch.Tensor | None) -> OutputHead:
    """Return the output layer as the loss takes it; only on the last stage.

    The weight's gradient goes straight into Megatron's buffer: it is as large as the weight and never exists twice.
    """
    loss, weight = run.config.loss, run.chunks[-1].output_weight
    # Reductions that overlap start where autograd hands over a gradient, so it must see this one too.
    direct = weight.requires_grad and not run.config.parallel.overlap_grad_reduce
    main_grad = weight.main_grad if direct else None
    return OutputHead(
        weight=weight,
        shard=run.shard,
        group=run.layout.tensor_group,
        teacher_weight=teacher_weight,
        gradient_options=GradientOptions(loss.recompute, main_grad, run.config.parallel.sequence),
        implementation=loss.implementation,
        scratch_bytes=loss.scratch_bytes,
    )


def evaluate(run: Run, done: int) -> None:
    """Measure accuracy on every held-out source under the current weights and record it."""
    settings = run.config.eval
    if run.config.sglang.pause != "wait":
        sync_weights(run, done)
    run.begun.settle(run.engine, weight_version=done)
    sync_weights(run, done)
    sampling = sampling_for_evaluation(run.config, run.stop_ids)
    for label, pairs in run.eval_pairs.items():
        report = evaluate_source(run.engine, pairs, sampling, settings.samples, run.config.run.seed)
        if run.monitor:
            run.monitor.numbers(done, {f"eval/{label}/{name}": value for name, value in report.numbers().items()})
            run.monitor.say(f"step {done}: {label}: {report.summary()}")


def save(run: Run, done: int) -> None:
    """Write a checkpoint that appears only when complete, and drop the oldest."""
    state = checkpoint.TrainingState(run.chunks, run.optimization, run.teacher, done, run.adaptation)
    folder = checkpoint.save(run.folder / "checkpoints", state, keep=run.config.checkpoint.keep)
    if run.monitor:
        run.monitor.say(f"step {done}: saved {folder}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[phase] = time.perf_counter() - start
