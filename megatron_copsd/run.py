"""From a configuration to everything a run consists of, on this process; and a model or an engine by itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from transformers import PreTrainedTokenizerBase

from megatron_copsd import platform
from megatron_copsd.config.schema import Config
from megatron_copsd.data.items import Items, load_items
from megatron_copsd.data.sampler import ProblemSampler
from megatron_copsd.data.subsets import TrainItem, shares
from megatron_copsd.engines import EngineKind, open_engine
from megatron_copsd.hf.folder import RandomTensors, TensorReader, TensorSource, read_hf_config, resolve_folder
from megatron_copsd.hf.read import read_architecture
from megatron_copsd.hf.texts.stops import stop_ids
from megatron_copsd.hf.texts.tokenizer import load_tokenizer
from megatron_copsd.loss.implementation import explain
from megatron_copsd.methods import build_method
from megatron_copsd.methods.base import Method
from megatron_copsd.model import checkpoint, parallel
from megatron_copsd.model.build import LocalModel, build_model, wrap_for_training
from megatron_copsd.model.lora import Adaptation, add_adapters
from megatron_copsd.model.optimizer import Optimization, build_optimization
from megatron_copsd.model.parallel import Layout
from megatron_copsd.model.teacher import TeacherWeights
from megatron_copsd.model.weights import load_weights
from megatron_copsd.records.monitor import Monitor
from megatron_copsd.records.origin import Origin, architecture_of, compare, origin_of
from megatron_copsd.records.paths import RunFolder
from megatron_copsd.rollout.engine import RolloutEngine, Sampling
from megatron_copsd.rollout.schedule import ReferenceResponses, ResponseSource, RolloutSchedule
from megatron_copsd.sync.log_probs import TrainerProbes
from megatron_copsd.sync.push import WeightPush
from megatron_copsd.types import PromptPair

_MIB = 1 << 20


@dataclass(frozen=True)
class Run:
    """Everything one process needs to train.

    Attributes:
        config: settings.
        folder: where the run writes.
        platform: this process's device.
        model: its stage and shard of the model; ``ddp`` are the same chunks behind Megatron's gradient buffers.
        optimization: optimiser and learning rate.
        teacher: the teacher's weights.
        method: how samples and their loss are made.
        engine: samples responses.
        responses: what every step is trained on.
        tokenizer: of the model; made prompts, decodes responses.
        stop_ids: token ids that end a response.
        eval_pairs: prompts of the held-out sources by label.
        validation: prompts and responses of the sources whose loss is measured, by label.
        monitor: on the main process only.
        steps_done: steps of the checkpoint the run continues from; 0 for a fresh one.
        origin: what its checkpoints say about where they are from.
    """

    config: Config
    folder: RunFolder
    platform: platform.Platform
    model: LocalModel
    ddp: tuple[DistributedDataParallel, ...]
    optimization: Optimization
    teacher: TeacherWeights
    method: Method
    engine: RolloutEngine
    responses: ResponseSource
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    eval_pairs: Mapping[str, tuple[PromptPair, ...]]
    validation: Mapping[str, tuple[TrainItem, ...]]
    monitor: Monitor | None
    steps_done: int
    origin: Origin


def assemble(config: Config) -> Run:
    """Read data and weights, build the model and resume from the newest checkpoint; the run's folder stays as it is.

    Collectives: creates the process groups; every process of the world must call it.

    Raises:
        UserError: data, model or checkpoint do not fit the settings or each other.
    """
    folder = RunFolder(Path(config.run.dir))
    if config.sglang.transport == "distributed":
        # As SGLang sets it for itself: both ends of a group must agree. NCCL reads it once.
        os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
    here = platform.start(config.parallel.timeout_s)
    layout = parallel.initialize(config.parallel)
    architecture = read_architecture(config.model.path, config.model.revision)
    tokenizer = load_tokenizer(config.model.path, config.model.revision, architecture.vocab_size)
    stops = stop_ids(config, tokenizer, architecture.vocab_size)
    items = load_items(config, tokenizer, show=here.is_main)

    model_files = resolve_folder(config.model.path, config.model.revision)
    origin = origin_of(config, tokenizer, tuple(len(source) for source in items.train), model_files)
    model = open_model(config, layout, here.device)
    ddp = wrap_for_training(model.chunks, config.optimizer.distributed, config.parallel.overlap_grad_reduce)
    optimization = build_optimization(ddp, config.optimizer, config.run.steps)
    teacher = TeacherWeights(model.chunks, config.teacher)
    newest = checkpoint.newest_intact(folder) if config.checkpoint.resume else None
    steps_done = 0
    if newest:
        origin.require_same(newest.path)
        steps_done = checkpoint.load(newest.path, checkpoint.TrainingState(model, optimization, teacher, 0))
    monitor = Monitor(config, folder, steps_done) if here.is_main else None
    if monitor:
        if newest:
            notes = [*newest.notes, *compare(newest.path, config).notes]
            monitor.say("\n".join([*notes, f"continuing from {newest.path}, {steps_done} steps done"]))
        monitor.say(_loss_summary(config, model, here.device))
    kind: EngineKind = "sglang" if config.trains_with_servers else "embedded"
    engine = open_engine(config, kind, tokenizer, here, monitor.say if monitor else None)
    return Run(
        config=config,
        folder=folder,
        platform=here,
        model=model,
        ddp=ddp,
        optimization=optimization,
        teacher=teacher,
        method=build_method(config),
        engine=engine,
        responses=_response_source(config, engine, model, ddp, items, stops),
        tokenizer=tokenizer,
        stop_ids=stops,
        eval_pairs=items.held_out,
        validation=items.validation,
        monitor=monitor,
        steps_done=steps_done,
        origin=origin,
    )


def _response_source(
    config: Config,
    engine: RolloutEngine,
    model: LocalModel,
    ddp: Sequence[DistributedDataParallel],
    items: Items,
    stops: tuple[int, ...],
) -> ResponseSource:
    """What the method learns from: the data's references, or rollouts of an engine that is given the weights."""
    sizes = [len(source) for source in items.train]
    sampler = ProblemSampler(sizes, shares(config.data.train, items.train), config.run.seed)

    def draw(step: int) -> list[TrainItem]:
        drawn = sampler.take(step, config.rollout.prompts_per_step)
        return [item for source, unit in drawn for item in items.train[source][unit]]

    by_probes = config.trains_with_servers and config.sglang.verify == "logprobs"
    first_pairs = [pair for unit in items.train[0] for pair, _ in unit]
    probes = TrainerProbes(config, model, ddp, first_pairs, pad_id=stops[0]) if by_probes else None
    push = WeightPush(engine, model, int(config.rollout.bucket_mb * _MIB), probes)
    if not config.method.samples_responses:
        return ReferenceResponses(draw, push)
    return RolloutSchedule(engine, draw, push, config, stops)


def open_model(config: Config, layout: Layout, device: torch.device, saved: Path | None = None) -> LocalModel:
    """Build this process's part of the model with its weights and, under LoRA, the adapters beside them.

    Args:
        config: settings.
        layout: this process's place.
        device: where parameters are.
        saved: checkpoint, of any layout, whose weights or adapters take the place of the initial ones.

    Collectives: none without ``saved``; every process of the world must call it with the same.

    Raises:
        UserError: weights, checkpoint and configuration do not fit each other.
    """
    architecture = architecture_of(config, saved)
    chunks = build_model(architecture, config.model, layout, device)
    adaptation = None
    if saved is None or config.lora.rank:
        source: TensorSource
        if config.model.init == "random":
            hf_config = read_hf_config(config.model.path, config.model.revision)
            source = RandomTensors(hf_config, config.run.seed)
        else:
            source = TensorReader(resolve_folder(config.model.path, config.model.revision))
        load_weights(chunks, architecture, source, layout.tensor_rank, layout.tensor_size)
        if config.lora.rank:
            for chunk in chunks:
                add_adapters(chunk, architecture, config.lora, layout, config.run.seed)
            adaptation = Adaptation(
                config.lora.rank, config.lora.scale, sorted(config.lora.targets), source.fingerprint()
            )
    model = LocalModel(architecture, layout, chunks, adaptation)
    if saved is not None:
        checkpoint.load_model(saved, model)
    return model


def sampling_for_evaluation(config: Config, stops: tuple[int, ...]) -> Sampling:
    """Return how held-out problems are answered."""
    max_tokens = config.eval.max_response_tokens or config.rollout.max_response_tokens
    return Sampling(config.eval.temperature, config.eval.top_p, 0, max_tokens, stops)


def _loss_summary(config: Config, model: LocalModel, device: torch.device) -> str:
    """Which way the loss is computed, why, and what it takes for the largest microbatch."""
    # Of the same shape everywhere, so the main process can speak for the last stage; takes no memory.
    weight = torch.empty((), dtype=platform.DTYPES[config.model.dtype], device=device)
    weight = weight.expand(model.shard.rows, model.architecture.hidden)
    longest, by_tokens = config.rollout.max_response_tokens, config.optimizer.micro_batch_tokens
    # A budget in tokens counts prompts too, and a sequence that exceeds it gets a microbatch of its own.
    rows = config.optimizer.micro_batch_size * longest if by_tokens is None else max(by_tokens, longest)
    loss, views = config.loss, 2 if config.method.uses_teacher else 1
    top_k = loss.teacher_top_k is not None
    return explain(loss.implementation, weight, rows, views, loss.scratch_bytes, top_k=top_k)
