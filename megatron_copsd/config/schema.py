"""Every setting of a run, with its type, default and meaning.

Models are frozen and refuse unknown keys. A setting that depends on another is checked in ``check.py``; a setting that
is wrong by itself is refused here. Field descriptions are shown by ``copsd train --help-settings``.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from megatron_copsd.config.method import TRAITS, MethodName, MethodTraits

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class RunSettings(Settings):
    """What the run is called, where it writes and how long it goes."""

    name: str = Field("copsd", min_length=1, description="name of the run, shown in logs and trackers")
    dir: str = Field("runs/copsd", min_length=1, description="folder of every artefact of the run")
    steps: PositiveInt = Field(100, description="optimiser steps")
    seed: NonNegativeInt = Field(0, description="seed of data order, sampling and initialisation")


class ModelSettings(Settings):
    """The model that is both student and teacher."""

    path: str = Field(..., min_length=1, description="HF folder, or a hub name such as Qwen/Qwen3-1.7B")
    revision: str | None = Field(None, description="hub revision (branch, tag or commit)")
    init: Literal["weights", "random"] = Field("weights", description="read safetensors, or initialise from run.seed")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="dtype of parameters and activations")
    implementation: Literal["auto", "torch", "transformer_engine"] = Field(
        "auto",
        description="layer implementation; auto takes Transformer Engine where it imports and a GPU is present, except "
        "in float32",
    )
    moe_aux_loss: NonNegativeFloat = Field(
        0.0,
        description="coefficient of the experts' load-balancing loss. 0: the teacher routes as the model was trained "
        "to, and a pull towards even use would move a student away from it that agrees with it",
    )


class ParallelSettings(Settings):
    """How the model is cut over processes; data parallelism takes what is left of the world size."""

    tensor: PositiveInt = Field(1, description="tensor parallel size (TP)")
    pipeline: PositiveInt = Field(1, description="pipeline parallel size (PP)")
    context: PositiveInt = Field(1, description="context parallel size (CP): ranks that share each sequence")
    expert: PositiveInt = Field(
        1, description="expert parallel size (EP): each stage's experts are spread over this many of its processes"
    )
    virtual_pipeline: PositiveInt = Field(
        1, description="model chunks a pipeline stage (VPP): the interleaved schedule"
    )
    first_stage_layers: PositiveInt | None = Field(
        None, description="layers of the first pipeline stage; an even share"
    )
    last_stage_layers: PositiveInt | None = Field(None, description="layers of the last pipeline stage; an even share")
    sequence: bool = Field(False, description="cut activations between the tensor-parallel regions by position (SP)")
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations made again in the backward pass; selective: of feed-forwards, full: of layers",
    )
    recompute_layers: PositiveInt | None = Field(
        None, description="recompute full: only the first n layers of each model chunk; all of them if null"
    )
    overlap_grad_reduce: bool = Field(
        False, description="reduce gradients over replicas while the backward pass still runs"
    )
    timeout_s: PositiveFloat = Field(600.0, description="seconds after which a collective that hangs ends the run")


class DataSource(Settings):
    """One set of problems and how its rows are laid out."""

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9_.-]+$", description="label in metrics; the file's by default")
    path: str = Field(..., min_length=1, description="JSON, JSONL, Parquet or TSV file, or a hub data set name")
    layout: Literal["reference", "released", "parallel"] = Field(
        ...,
        description="reference: problem, solution, problem_<lang>; released: problem, problem_translated, solution, "
        "Answer, language_short; parallel: TSV of question and answer, aligned row by row with english and solutions",
    )
    language: str = Field(..., description="code of the problems' language, e.g. SWA")
    english: str | None = Field(None, description="parallel layout: TSV of the English statements")
    solutions: str | None = Field(None, description="parallel layout: JSONL with the English worked solutions (answer)")
    split: str = Field("train", description="split of a hub data set")
    first: NonNegativeInt = Field(0, description="rows to skip")
    count: PositiveInt | None = Field(None, description="rows to take after those skipped; all by default")
    view: Literal["student", "teacher"] = Field("student", description="sft: which prompt the responses are trained on")
    weight: PositiveFloat = Field(1.0, description="share of the training stream, relative to the other sources")

    @property
    def label(self) -> str:
        """What metrics call this source."""
        return self.name or f"{PurePath(self.path).stem}-{self.language.lower()}"


class DataSettings(Settings):
    """Which problems are trained on and which are held out."""

    train: tuple[DataSource, ...] = Field(..., min_length=1, description="sources of the training stream")
    eval: tuple[DataSource, ...] = Field((), description="held-out sources, each reported by itself")


class PromptSettings(Settings):
    """How a problem becomes the student's and the teacher's prompt."""

    template: Literal["chat", "plain"] = Field("chat", description="the tokenizer's chat template, or plain text")
    thinking: Literal["prefix", "empty", "off"] = Field(
        "off",
        description="prefix: open a thinking block in the target language; empty: a closed empty block; off: none",
    )
    include_problem_en: bool | None = Field(
        None, description="show the teacher the English problem; null: unless the objective is opsd"
    )
    include_solution: bool = Field(True, description="show the teacher the English solution")
    max_student_tokens: PositiveInt = Field(1024, description="longest student prompt")
    max_teacher_tokens: PositiveInt = Field(4096, description="longest teacher prompt")
    overlong: Literal["error", "drop"] = Field("drop", description="what happens to a longer prompt; drops are counted")


class RolloutSettings(Settings):
    """How responses are sampled."""

    engine: Literal["embedded", "sglang"] = Field(
        "embedded", description="embedded: transformers generate in each process; sglang: servers (section sglang)"
    )
    ahead: Literal[0, 1] = Field(
        0, description="1: sample the next step's responses while this step trains, one weight version behind"
    )
    agreement_every: NonNegativeInt = Field(
        0, description="compare the engine's log-probabilities with the trainer's on every n-th step; 0 is never"
    )
    agreement_limit: PositiveFloat = Field(
        0.5, description="largest difference of a token's log-probability, in nats, before a warning (or an error)"
    )
    agreement_failure: Literal["warn", "stop"] = Field("warn", description="what a difference above the limit does")
    prompts_per_step: PositiveInt = Field(32, description="problems drawn for one step")
    samples_per_prompt: PositiveInt = Field(1, description="responses sampled for each problem")
    max_response_tokens: PositiveInt = Field(1024, description="longest response")
    temperature: PositiveFloat = Field(1.0, description="sampling temperature")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="nucleus sampling; 1 is off")
    top_k: NonNegativeInt = Field(0, description="sample among the k likeliest tokens; 0 is off")
    stop_token_ids: tuple[NonNegativeInt, ...] = Field((), description="stop ids; the model's own when empty")
    batch_size: PositiveInt = Field(64, description="sequences generated at once by one process")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="dtype of the engine; the model's by default"
    )
    bucket_mb: PositiveFloat = Field(256.0, description="weight sync: bytes handed over at once, in MiB")
    save_every: NonNegativeInt = Field(1, description="write the rollouts of every n-th step; 0 is never")


class SglangSettings(Settings):
    """The SGLang servers that sample where rollout.engine is sglang."""

    urls: tuple[str, ...] = Field((), description="servers that run already; the trainer starts its own when empty")
    servers: PositiveInt = Field(1, description="servers to start on each of the trainer's nodes")
    python: str | None = Field(None, description="interpreter of SGLang's environment; the one of make sglang if null")
    host: str = Field(
        "127.0.0.1",
        description="address that our servers listen on, and are reached at; auto: each node's own in the trainer's "
        "network, which several nodes need",
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(0, description="port of our first server; 0 takes free ones")
    tensor: PositiveInt = Field(1, description="tensor-parallel size of each server")
    devices: tuple[NonNegativeInt, ...] = Field(
        (),
        description="CUDA devices of a node's servers, sglang.servers x sglang.tensor of them; empty: on the CPU, "
        "where there is no GPU",
    )
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="share of memory for weights and cache (more where the device is the server's alone)"
    )
    release_memory: bool = Field(
        False, description="servers on the trainer's own devices: they give up their memory while it trains"
    )
    max_total_tokens: PositiveInt | None = Field(None, description="tokens in the cache; the server decides if null")
    extra_arguments: tuple[str, ...] = Field((), description="further arguments of sglang.launch_server")
    transport: Literal["disk", "distributed", "tensor"] = Field(
        "disk", description="weights go through files, a process group (NCCL, Gloo), or shared memory (one machine)"
    )
    folder: str | None = Field(
        None, description="where the disk transport makes its folder, seen by all servers; run.dir if null"
    )
    pause: Literal["wait", "retract", "in_place"] = Field(
        "wait",
        description="new weights while responses are sampled (rollout.ahead: 1): wait: those are finished before; "
        "retract: they go on under the new weights, keys and values computed anew; in_place: with those of the old",
    )
    verify: Literal["checksum", "logprobs", "off"] = Field(
        "off",
        description="after every sync, compare each server's weights with the trainer's: checksum: bits (dense models, "
        "neither quantised nor packed); logprobs: what both say of a few prompts, within sglang.verify_limit",
    )
    verify_limit: PositiveFloat = Field(
        0.1, description="verify logprobs: largest mean difference of a token's log-probability, in nats"
    )
    concurrency: PositiveInt = Field(64, description="requests at a server at once")
    attempts: PositiveInt = Field(4, description="times that a request, a sync or a lost server is tried")
    request_timeout_s: PositiveFloat = Field(600.0, description="longest wait for one response")
    silence_timeout_s: PositiveFloat = Field(
        120.0, description="longest time that a server may be busy with one batch before it is taken for hung"
    )
    start_timeout_s: PositiveFloat = Field(600.0, description="longest wait for a server to become ready")
    sync_timeout_s: PositiveFloat = Field(300.0, description="longest wait for a server to take one bucket of weights")


class TeacherSettings(Settings):
    """Whose weights the teacher uses."""

    weights: Literal["frozen", "live", "ema"] = Field(
        "frozen", description="frozen: the initial weights; live: the student's current ones; ema: a moving average"
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = Field(0.999, description="per-step decay of the moving average")
    cache: Literal["auto", "device", "host"] = Field(
        "auto", description="where the teacher's hidden states wait for the student; auto: by cache_mb"
    )
    cache_mb: NonNegativeFloat = Field(
        4096.0, description="cache auto: MiB of a process kept on its device, the rest goes to host memory"
    )

    @property
    def device_cache_bytes(self) -> float:
        """Bytes of hidden states that may stay on the model's device; the rest lies in host memory."""
        return {"device": float("inf"), "host": 0.0, "auto": self.cache_mb * 2**20}[self.cache]


class LossSettings(Settings):
    """The divergence between teacher and student."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl", description="forward_kl: KL(teacher||student); reverse_kl: KL(student||teacher); jsd: mixture"
    )
    jsd_weight: Annotated[float, Field(gt=0, lt=1)] = Field(0.5, description="teacher's weight in the jsd mixture")
    temperature: PositiveFloat = Field(1.0, description="divides the logits of both in the loss")
    entry_clip: PositiveFloat | None = Field(None, description="cap of each vocabulary entry before the sum")
    token_clip: PositiveFloat | None = Field(None, description="cap of a token's divergence after the sum")
    reduction: Literal["token_mean", "sequence_mean"] = Field(
        "token_mean", description="mean over all response tokens, or mean over responses of their token means"
    )
    scratch_mb: PositiveFloat | None = Field(
        None,
        description="budget of the logits scratch, in MiB; null: 1280 on CUDA (streaming: 128), 192 rows of logits on "
        "CPU",
    )
    teacher_top_k: PositiveInt | None = Field(
        None, description="cut the teacher to its k likeliest tokens, an approximation; null: the whole vocabulary"
    )
    implementation: Literal["auto", "torch", "chunk", "streaming"] = Field(
        "auto",
        description="torch: chunks of rows; chunk: the same in Triton; streaming: Triton, no logits in memory at "
        "all, more products; auto: by device, dtype and budget",
    )
    recompute: bool = Field(
        False, description="make gradients in the backward pass, from recomputed logits: less memory in between, slower"
    )

    @property
    def scratch_bytes(self) -> int | None:
        """``scratch_mb`` in bytes."""
        return None if self.scratch_mb is None else int(self.scratch_mb * 2**20)


Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoraSettings(Settings):
    """Low-rank adapters in place of full training; there is no dropout: teacher and student must differ by weights."""

    rank: NonNegativeInt = Field(0, description="rank of the adapters; 0 trains the whole model")
    alpha: PositiveFloat | None = Field(None, description="adapters count alpha / rank times; twice the rank if null")
    targets: tuple[Projection, ...] = Field(
        get_args(Projection), min_length=1, description="adapted projections, as Hugging Face names them"
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="dtype of the adapters; the model's if null (the optimiser's copy is float32 in any case)"
    )

    @property
    def scale(self) -> float:
        """What the product of an adapter's matrices is multiplied with."""
        return 2.0 if self.alpha is None else self.alpha / max(self.rank, 1)


class ObjectiveSettings(Settings):
    """Which objective the step minimises."""

    name: MethodName = Field(
        "copsd",
        description="copsd: towards the teacher that sees the English problem and solution; opsd: that sees the "
        "solution alone; grpo: by the reward of the answer; sft: the solutions of the data",
    )


class OptimizerSettings(Settings):
    """Megatron's Adam, its schedule and the batch arithmetic."""

    lr: PositiveFloat = Field(5e-6, description="peak learning rate")
    min_lr: NonNegativeFloat = Field(0.0, description="learning rate at the end of the decay")
    warmup_steps: NonNegativeInt = Field(0, description="steps of linear warm-up")
    decay: Literal["constant", "linear", "cosine"] = Field("constant", description="shape after the warm-up")
    beta1: Fraction = Field(0.9, description="Adam beta1")
    beta2: Fraction = Field(0.999, description="Adam beta2")
    eps: PositiveFloat = Field(1e-8, description="Adam epsilon")
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled weight decay")
    clip_grad: NonNegativeFloat = Field(1.0, description="gradient norm cap; 0 is off")
    micro_batch_size: PositiveInt = Field(4, description="sequences per microbatch, where micro_batch_tokens is null")
    micro_batch_tokens: PositiveInt | None = Field(
        None, description="tokens per microbatch, padding included; balances ranks and microbatches by tokens"
    )
    teacher_micro_batch_size: PositiveInt | None = Field(
        None, description="sequences per microbatch of the teacher; null: as the student's"
    )
    teacher_micro_batch_tokens: PositiveInt | None = Field(
        None, description="tokens per microbatch of the teacher; null: as teacher_micro_batch_size, or the student's"
    )
    packing: bool = Field(False, description="lay a microbatch's sequences behind each other instead of padding them")
    distributed: bool = Field(True, description="shard optimiser state over data-parallel ranks")


class CheckpointSettings(Settings):
    """When the run's state is written and whether it continues from it."""

    save_every: NonNegativeInt = Field(50, description="steps between checkpoints; 0 saves only at the end")
    keep: PositiveInt = Field(2, description="newest checkpoints kept")
    resume: bool = Field(True, description="continue from the newest complete checkpoint in run.dir")


class EvalSettings(Settings):
    """Accuracy on the held-out sources."""

    every: NonNegativeInt = Field(0, description="steps between evaluations; 0 is only when asked for")
    at_start: bool = Field(False, description="evaluate before the first step")
    at_end: bool = Field(False, description="evaluate after the last step")
    samples: PositiveInt = Field(1, description="responses per problem; 1 with temperature 0 is greedy")
    temperature: NonNegativeFloat = Field(0.0, description="0 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="nucleus sampling; 1 is off")
    max_response_tokens: PositiveInt | None = Field(None, description="longest response; the rollout's by default")


class LogSettings(Settings):
    """Where numbers go besides the screen and metrics.jsonl."""

    tensorboard: bool = Field(True, description="write TensorBoard events under run.dir")
    wandb_project: str | None = Field(None, description="Weights & Biases project; needs wandb installed")


class Config(Settings):
    """One run."""

    run: RunSettings = RunSettings()
    model: ModelSettings
    parallel: ParallelSettings = ParallelSettings()
    data: DataSettings
    prompt: PromptSettings = PromptSettings()
    rollout: RolloutSettings = RolloutSettings()
    sglang: SglangSettings = SglangSettings()
    teacher: TeacherSettings = TeacherSettings()
    loss: LossSettings = LossSettings()
    lora: LoraSettings = LoraSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    eval: EvalSettings = EvalSettings()
    log: LogSettings = LogSettings()

    @property
    def method(self) -> MethodTraits:
        """What the objective asks of a step."""
        return TRAITS[self.objective.name]

    @property
    def shown_prompt(self) -> PromptSettings:
        """The prompt section as the method takes it: one without the English problem shows none by default."""
        if self.method.shows_problem_en:
            return self.prompt
        return self.prompt.model_copy(update={"include_problem_en": False})

    @property
    def trains_with_servers(self) -> bool:
        """Whether a training's responses come from SGLang; a method that samples none evaluates by itself."""
        return self.rollout.engine == "sglang" and self.method.samples_responses
