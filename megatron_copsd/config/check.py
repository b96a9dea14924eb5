"""Rules that tie several settings together, and files that must exist; all are checked before anything starts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from megatron_copsd.config.load import KeyPath, LoadedConfig
from megatron_copsd.config.schema import Config, DataSource, ParallelSettings
from megatron_copsd.errors import UserError, describe
from megatron_copsd.languages import language

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
_FILE_SUFFIXES = {".json", ".jsonl", ".parquet", ".tsv"}


def check(loaded: LoadedConfig) -> None:
    """Refuse combinations that can't work.

    Raises:
        UserError: with every problem found, one a line.
    """
    problems = [
        describe(f"{loaded.places.of(key)}: {_dotted(key)}", value, rule, remedy)
        for key, value, rule, remedy in _problems(loaded.config)
    ]
    for section in ("train", "eval"):
        for i, source in enumerate(getattr(loaded.config.data, section)):
            key = ("data", section, i, "language")
            try:
                language(source.language, f"{loaded.places.of(key)}: {_dotted(key)}")
            except UserError as error:
                problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def expert_problems(config: Config, has_experts: bool) -> list[tuple[str, object, str, str]]:
    """Return (setting, value, rule, remedy) for every setting that does not suit a model with experts, or without."""
    found: list[tuple[str, object, str, str]] = []
    if config.model.moe_aux_loss and not has_experts:
        found.append(("model.moe_aux_loss", config.model.moe_aux_loss, "the model has no experts", "Remove it."))
    of_experts = [target for target in config.lora.targets if target in _FEED_FORWARD]
    if config.lora.rank and has_experts and of_experts:
        others = [target for target in config.lora.targets if target not in _FEED_FORWARD] or _ATTENTION
        rule = f"the model's {', '.join(of_experts)} belong to experts, which get no adapters"
        found.append(("lora.targets", list(config.lora.targets), rule, f"Set [{', '.join(others)}]."))
    return found


def check_nodes(config: Config, nodes: int) -> None:
    """Refuse what servers of our own can't do on several nodes.

    Raises:
        UserError: as said.
    """
    sglang = config.sglang
    if nodes == 1 or sglang.urls or not config.trains_with_servers:
        return
    if sglang.host != "auto":
        rule = f"the run has {nodes} nodes, and each node's servers need an address of their own"
        raise UserError(describe("sglang.host", sglang.host, rule, "Set auto."))
    if sglang.transport == "tensor":
        rule = f"the run has {nodes} nodes, which share no memory"
        raise UserError(describe("sglang.transport", sglang.transport, rule, "Set disk or distributed."))


Problem = tuple[KeyPath, object, str, str]


def _problems(config: Config) -> list[Problem]:
    found: list[Problem] = []
    optimizer, rollout, loss = config.optimizer, config.rollout, config.loss
    if optimizer.min_lr > optimizer.lr:
        found.append(
            (("optimizer", "min_lr"), optimizer.min_lr, f"must not exceed optimizer.lr = {optimizer.lr}", "Lower it.")
        )
    if optimizer.warmup_steps >= config.run.steps:
        rule = f"must be below run.steps = {config.run.steps}"
        found.append((("optimizer", "warmup_steps"), optimizer.warmup_steps, rule, "Lower it or train longer."))
    method = config.method
    if method.compares_samples and rollout.samples_per_prompt < 2:
        rule = f"{method.name} compares the samples of a prompt with each other and needs at least 2"
        found.append((("rollout", "samples_per_prompt"), rollout.samples_per_prompt, rule, "Set 8, for example."))
    if not method.samples_responses and rollout.samples_per_prompt != 1:
        rule = f"{method.name} has one response a problem, from the data"
        found.append((("rollout", "samples_per_prompt"), rollout.samples_per_prompt, rule, "Set 1."))
    if loss.divergence != "jsd" and "jsd_weight" in loss.model_fields_set:
        rule = f"has no effect with loss.divergence = {loss.divergence}"
        found.append((("loss", "jsd_weight"), loss.jsd_weight, rule, "Remove it, or set divergence: jsd."))
    if config.teacher.weights != "ema" and "ema_decay" in config.teacher.model_fields_set:
        rule = f"has no effect with teacher.weights = {config.teacher.weights}"
        found.append((("teacher", "ema_decay"), config.teacher.ema_decay, rule, "Remove it, or set weights: ema."))
    if config.teacher.cache != "auto" and "cache_mb" in config.teacher.model_fields_set:
        rule = f"has no effect with teacher.cache = {config.teacher.cache}"
        found.append((("teacher", "cache_mb"), config.teacher.cache_mb, rule, "Remove it, or set cache: auto."))
    if optimizer.teacher_micro_batch_size is not None and optimizer.teacher_micro_batch_tokens is not None:
        rule = "optimizer.teacher_micro_batch_tokens says how large the teacher's microbatches are"
        key = ("optimizer", "teacher_micro_batch_size")
        found.append((key, optimizer.teacher_micro_batch_size, rule, "Set one of the two to null."))
    if config.prompt.template == "plain" and config.prompt.thinking != "off":
        rule = "a plain prompt has no thinking block"
        found.append((("prompt", "thinking"), config.prompt.thinking, rule, "Set thinking: off or template: chat."))
    if (
        not method.shows_problem_en
        and config.prompt.include_problem_en
        and "include_problem_en" in config.prompt.model_fields_set
    ):
        rule = f"objective.name = {method.name} shows the teacher no English problem"
        found.append((("prompt", "include_problem_en"), True, rule, "Remove it, or train with copsd."))
    found += _parallel_problems(config)
    found += _lora_problems(config)
    found += _engine_problems(config)
    evaluates = config.eval.every or config.eval.at_start or config.eval.at_end
    if evaluates and not config.data.eval:
        found.append((("data", "eval"), [], "evaluation is asked for and there is no held-out source", "Add one."))
    if config.eval.samples > 1 and config.eval.temperature == 0:
        rule = f"with temperature 0 all eval.samples = {config.eval.samples} responses are the same"
        found.append((("eval", "temperature"), 0, rule, "Raise it, or set samples: 1."))
    if config.log.wandb_project and importlib.util.find_spec("wandb") is None:
        rule = "wandb is not installed"
        found.append((("log", "wandb_project"), config.log.wandb_project, rule, "pip install wandb, or remove it."))
    for i, source in enumerate(config.data.train):
        if source.view == "teacher" and method.samples_responses:
            rule = f"objective.name = {method.name} gives every problem both views"
            found.append((("data", "train", i, "view"), source.view, rule, "Remove it, or train with sft."))
    labels: dict[str, KeyPath] = {}
    for i, source in enumerate(config.data.eval):
        if source.label in labels:
            rule = f"another held-out source, {_dotted(labels[source.label])}, has this name too"
            found.append((("data", "eval", i, "name"), source.label, rule, "Give each a name of its own."))
        labels[source.label] = ("data", "eval", i)
    for section, sources in (("train", config.data.train), ("eval", config.data.eval)):
        for i, source in enumerate(sources):
            found += _source_problems(("data", section, i), source)
    return found


def _parallel_problems(config: Config) -> list[Problem]:
    found: list[Problem] = []
    parallel = config.parallel
    if parallel.sequence and parallel.tensor == 1:
        rule = "cuts the sequence over tensor-parallel ranks, and parallel.tensor = 1"
        found.append((("parallel", "sequence"), True, rule, "Set false, or raise parallel.tensor."))
    if parallel.recompute_layers is not None and parallel.recompute != "full":
        rule = f"has no effect with parallel.recompute = {parallel.recompute}"
        found.append(
            (("parallel", "recompute_layers"), parallel.recompute_layers, rule, "Remove it, or set recompute: full.")
        )
    if parallel.pipeline == 1:
        for name in ("virtual_pipeline", "first_stage_layers", "last_stage_layers"):
            value = getattr(parallel, name)
            if value != ParallelSettings.model_fields[name].default:
                rule = "cuts up a pipeline, and parallel.pipeline = 1"
                found.append((("parallel", name), value, rule, "Remove it, or raise parallel.pipeline."))
    return found


def _lora_problems(config: Config) -> list[Problem]:
    found: list[Problem] = []
    lora = config.lora
    if lora.rank == 0:
        for name in sorted(lora.model_fields_set - {"rank"}):
            value = getattr(lora, name)
            found.append((("lora", name), value, "has no effect with lora.rank = 0", "Remove it, or set a rank."))
    for i, target in enumerate(lora.targets):
        if target in lora.targets[:i]:
            found.append((("lora", "targets", i), target, "is named twice", "Name it once."))
    return found


def _engine_problems(config: Config) -> list[Problem]:
    found: list[Problem] = []
    rollout, sglang = config.rollout, config.sglang
    if rollout.engine != "sglang":
        if rollout.ahead:
            rule = "the embedded engine samples in the trainer's own processes and can't work while they train"
            found.append((("rollout", "ahead"), rollout.ahead, rule, "Set 0, or engine: sglang."))
        return found
    if sglang.urls and sglang.devices:
        rule = "servers that run already have chosen their devices (sglang.urls)"
        found.append((("sglang", "devices"), list(sglang.devices), rule, "Remove one of the two."))
    if sglang.urls and sglang.transport == "tensor":
        rule = "memory is shared with servers of our own only, and sglang.urls names others"
        found.append((("sglang", "transport"), sglang.transport, rule, "Set disk or distributed."))
    if sglang.devices and len(sglang.devices) != sglang.servers * sglang.tensor:
        rule = f"must name sglang.servers x sglang.tensor = {sglang.servers} x {sglang.tensor} devices"
        found.append((("sglang", "devices"), list(sglang.devices), rule, "List that many."))
    if not sglang.devices and sglang.tensor > 1 and not sglang.urls:
        found.append((("sglang", "tensor"), sglang.tensor, "a server on the CPU takes 1", "Set 1, or name devices."))
    if sglang.release_memory and not sglang.devices:
        rule = "is for servers of our own on the trainer's devices (sglang.devices)"
        found.append((("sglang", "release_memory"), True, rule, "Set false, or name devices."))
    if sglang.transport == "distributed" and sglang.sync_timeout_s >= config.parallel.timeout_s:
        rule = f"must be below parallel.timeout_s = {config.parallel.timeout_s:g}, as the trainer waits in a collective"
        found.append((("sglang", "sync_timeout_s"), sglang.sync_timeout_s, rule, "Lower it, or raise the other."))
    if sglang.pause != "wait" and not rollout.ahead:
        rule = "nothing is being sampled at a weight sync unless rollout.ahead is 1"
        found.append((("sglang", "pause"), sglang.pause, rule, "Set wait, or rollout.ahead: 1."))
    if sglang.pause != "wait" and sglang.verify == "logprobs":
        rule = f"servers that are paused answer no prompts (sglang.pause: {sglang.pause})"
        found.append((("sglang", "verify"), sglang.verify, rule, "Set checksum, or sglang.pause: wait."))
    if sglang.release_memory and rollout.ahead:
        rule = "with rollout.ahead the servers work while the trainer does"
        found.append((("sglang", "release_memory"), True, rule, "Set one of the two."))
    if sglang.release_memory and sglang.transport == "distributed":
        rule = "NCCL takes no two processes on one device into a group, and servers share the trainer's"
        found.append((("sglang", "transport"), sglang.transport, rule, "Set tensor or disk."))
    for url in sglang.urls:
        if not url.startswith(("http://", "https://")):
            found.append((("sglang", "urls"), url, "must be http://HOST:PORT", "Write the whole address."))
    return found


def _source_problems(key: KeyPath, source: DataSource) -> list[Problem]:
    found: list[Problem] = []
    for name in ("path", "english", "solutions"):
        value = getattr(source, name)
        if value is not None and Path(value).suffix in _FILE_SUFFIXES and not Path(value).is_file():
            found.append(((*key, name), value, "no such file", "Paths start at the current directory."))
    return found


def _dotted(key: KeyPath) -> str:
    return ".".join(map(str, key))
