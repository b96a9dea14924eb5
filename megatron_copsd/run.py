"""From a configuration to everything a run consists of, on this process."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from megatron_copsd import platform
from megatron_copsd.config.dump import dump_config
from megatron_copsd.config.schema import Config
from megatron_copsd.data.items import TrainItem, load_items
from megatron_copsd.data.sampler import ProblemSampler
from megatron_copsd.engines import build_engine
from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.architecture import Architecture, read_architecture
from megatron_copsd.hf.folder import RandomTensors, TensorReader, TensorSource, resolve_folder
from megatron_copsd.loss.implementation import explain
from megatron_copsd.methods import build_method
from megatron_copsd.methods.base import Method
from megatron_copsd.model import checkpoint, parallel
from megatron_copsd.model.build import HiddenStatesModel, build_model, wrap_for_training
from megatron_copsd.model.lora import Adaptation, add_adapters
from megatron_copsd.model.optimizer import Optimization, build_optimization
from megatron_copsd.model.parallel import Layout
from megatron_copsd.model.teacher import TeacherWeights
from megatron_copsd.model.weights import load_weights
from megatron_copsd.records.metrics import Monitor
from megatron_copsd.rollout.engine import RolloutEngine, Sampling
from megatron_copsd.rollout.schedule import BegunRollouts
from megatron_copsd.types import PromptPair, VocabShard


@dataclass(frozen=True)
class Run:
    """Everything one process needs to train.

    Attributes:
        config: settings.
        folder: where the run writes.
        platform, layout: this process's device and place.
        architecture: sizes of the model.
        tokenizer: of the model; made prompts, decodes responses.
        stop_ids: token ids that end a response.
        chunks: this process's stage and shard, one chunk of layers or several; ``ddp`` are the same behind Megatron's
            gradient buffers.
        adaptation: what the model's adapters belong to; None where the whole model is trained.
        optimization: optimiser and learning rate.
        teacher: the teacher's weights.
        method: how samples and their loss are made.
        engine: samples responses.
        begun: responses that the engine was asked for.
        shard: vocabulary entries of this rank's output weight.
        sampler: draws problems; ``train_items[source][row]`` are their prompts and, supervised, responses.
        eval_pairs: prompts of the held-out sources by label.
        monitor: on the main process only.
        steps_done: steps of the checkpoint the run continues from; 0 for a fresh one.
    """

    config: Config
    folder: Path
    platform: platform.Platform
    layout: Layout
    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    chunks: tuple[HiddenStatesModel, ...]
    adaptation: Adaptation | None
    ddp: tuple[DistributedDataParallel, ...]
    optimization: Optimization
    teacher: TeacherWeights
    method: Method
    engine: RolloutEngine
    begun: BegunRollouts
    shard: VocabShard
    sampler: ProblemSampler
    train_items: tuple[tuple[TrainItem, ...], ...]
    eval_pairs: Mapping[str, tuple[PromptPair, ...]]
    monitor: Monitor | None
    steps_done: int


def assemble(config: Config) -> Run:
    """Read data and weights, build the model and resume from the newest checkpoint.

    Collectives: creates the process groups; every process of the world must call it.

    Raises:
        UserError: data, model or checkpoint do not fit the settings or each other.
    """
    folder = Path(config.run.dir)
    architecture, hf_config = read_architecture(config.model.path, config.model.revision)
    if config.sglang.transport == "distributed":
        # As SGLang sets it for itself: both ends of a group must agree. NCCL reads it once.
        os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
    here = platform.start(config.parallel.timeout_s)
    layout = parallel.initialize(config.parallel)
    tokenizer = load_tokenizer(config.model.path, config.model.revision)
    items = load_items(config, tokenizer, show=here.is_main)

    chunks = build_model(architecture, config.model, layout, here.device)
    adaptation = fill_model(chunks, architecture, config, hf_config, layout)
    ddp = wrap_for_training(chunks, config.optimizer.distributed, config.parallel.overlap_grad_reduce)
    optimization = build_optimization(ddp, config.optimizer, config.run.steps)
    teacher = TeacherWeights(chunks, config.teacher)
    steps_done = 0
    newest = checkpoint.newest(folder / "checkpoints") if config.checkpoint.resume else None
    if newest:
        steps_done = checkpoint.load(newest, checkpoint.TrainingState(chunks, optimization, teacher, 0, adaptation))
    monitor = Monitor(config, folder, steps_done) if here.is_main else None
    if monitor:
        (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    if monitor and newest:
        monitor.say(f"continuing from {newest}, {steps_done} steps done")
    local_vocab = architecture.padded_vocab(layout.tensor_size) // layout.tensor_size
    if monitor:
        # Of the same shape everywhere, so the main process can speak for the last stage; takes no memory.
        weight = torch.empty((), dtype=platform.DTYPES[config.model.dtype], device=here.device)
        monitor.say(_loss_summary(config, weight.expand(local_vocab, architecture.hidden)))
    return Run(
        config=config,
        folder=folder,
        platform=here,
        layout=layout,
        architecture=architecture,
        tokenizer=tokenizer,
        stop_ids=stop_ids(config, tokenizer),
        chunks=chunks,
        adaptation=adaptation,
        ddp=ddp,
        optimization=optimization,
        teacher=teacher,
        method=build_method(config),
        engine=build_engine(config, hf_config, architecture, tokenizer, here, monitor.say if monitor else None),
        begun=BegunRollouts(),
        shard=VocabShard(layout.tensor_rank * local_vocab, local_vocab, architecture.vocab_size),
        sampler=ProblemSampler(
            [len(source) for source in items.train], [source.weight for source in config.data.train], config.run.seed
        ),
        train_items=items.train,
        eval_pairs=items.held_out,
        monitor=monitor,
        steps_done=steps_done,
    )


def fill_model(
    chunks: Sequence[HiddenStatesModel],
    architecture: Architecture,
    config: Config,
    hf_config: PretrainedConfig,
    layout: Layout,
) -> Adaptation | None:
    """Load the model's initial weights and, under LoRA, put adapters beside them.

    Returns:
        What the adapters belong to; None where the whole model is trained.

    Raises:
        UserError: the weights do not fit the model.
    """
    source = _initial_tensors(config, hf_config)
    load_weights(chunks, architecture, source, layout.tensor_rank, layout.tensor_size)
    lora = config.lora
    if not lora.rank:
        return None
    for chunk in chunks:
        add_adapters(chunk, architecture, lora, layout, config.run.seed)
    return Adaptation(lora.rank, lora.scale, sorted(lora.targets), source.fingerprint())


def load_tokenizer(path: str, revision: str | None) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises:
        UserError: the folder or hub model has none.
    """
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        rule = f"its tokenizer could not be read ({str(error).splitlines()[0]})"
        raise UserError(describe("model.path", path, rule, "Put the tokenizer's files into the folder.")) from error


def stop_ids(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that end a response: those set, or the model's own and the tokenizer's.

    Raises:
        UserError: none is known.
    """
    ids = list(config.rollout.stop_token_ids)
    if not ids:
        try:
            own = GenerationConfig.from_pretrained(config.model.path, revision=config.model.revision).eos_token_id
        except OSError:
            own = None  # generation_config.json is optional
        ids = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    ids = sorted({token for token in ids if token is not None})
    if not ids:
        rule = "neither the settings, the model nor the tokenizer name an end-of-response token"
        raise UserError(describe("rollout.stop_token_ids", config.rollout.stop_token_ids, rule, "List the ids."))
    return tuple(ids)


def sampling_for_evaluation(config: Config, stops: tuple[int, ...]) -> Sampling:
    """Return how held-out problems are answered."""
    max_tokens = config.eval.max_response_tokens or config.rollout.max_response_tokens
    return Sampling(config.eval.temperature, config.eval.top_p, 0, max_tokens, stops)


def _initial_tensors(config: Config, hf_config: PretrainedConfig) -> TensorSource:
    if config.model.init == "random":
        return RandomTensors(hf_config, config.run.seed)
    return TensorReader(resolve_folder(config.model.path, config.model.revision))


def _loss_summary(config: Config, weight: torch.Tensor) -> str:
    """Which way the loss is computed, why, and what it takes for the largest microbatch."""
    longest, by_tokens = config.rollout.max_response_tokens, config.optimizer.micro_batch_tokens
    # A budget in tokens counts prompts too, and a sequence that exceeds it gets a microbatch of its own.
    rows = config.optimizer.micro_batch_size * longest if by_tokens is None else max(by_tokens, longest)
    loss, views = config.loss, 2 if config.method.uses_teacher else 1
    top_k = loss.teacher_top_k is not None
    return explain(loss.implementation, weight, rows, views, loss.scratch_bytes, top_k=top_k)
