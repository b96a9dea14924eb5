"""Training state on disk through Megatron's distributed checkpoints.

A checkpoint is a folder ``step_<n>`` that is written under another name and renamed when it is complete, so a process
killed during a save leaves the previous checkpoint as the newest. All randomness of a run is a function of its seed
and the step, so the step number is the whole state of sampler and random numbers. Where adapters are trained, they are
saved alone, with the fingerprint of the weights that they belong to.

A manifest tells an intact checkpoint from a damaged one, nothing that is not finite is written, and nothing that is
read runs code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from megatron_copsd.errors import UserError, describe
from megatron_copsd.model.build import HiddenStatesModel, LocalModel
from megatron_copsd.model.lora import Adaptation, adapters_of, sharded_adapters
from megatron_copsd.model.optimizer import Optimization, allocate_optimizer_state, load_optimizer_state
from megatron_copsd.model.teacher import TeacherWeights
from megatron_copsd.records import manifest, unpickle
from megatron_copsd.records.disk import refused_by_disk, refused_rule, refuses_more, remedy_for
from megatron_copsd.records.origin import STATE_FILE, Origin, read_facts
from megatron_copsd.records.paths import RunFolder, step_of

# Resharding-friendly layout of the optimiser state; Megatron's default layout can't be written by version 0.16.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}

_TAKE_ANOTHER = "Move it away to continue from the one before."
# A data file of Megatron's is named after the process that wrote it.
_WRITER = re.compile(r"__(\d+)_\d+\.distcp")

_NO_ADAPTERS = {"rank": 0}
_ADAPTATION_SETTINGS = {
    "rank": "lora.rank",
    "scale": "lora.alpha / lora.rank",
    "targets": "lora.targets",
    "base": "model.path (fingerprint of its weights)",
}


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint holds: objects that are read from and filled in place, and the number of steps done."""

    model: LocalModel
    optimization: Optimization
    teacher: TeacherWeights
    step: int


def save(run: RunFolder, state: TrainingState, origin: Origin, keep: int, best: int = 0) -> Path:
    """Write the run's checkpoint of ``state.step`` and delete those older than the ``keep`` newest intact ones.

    The one of step ``best`` is kept besides.

    Collectives: every process of the world must call it.

    Raises:
        UserError: a tensor of the state holds NaN or infinity, or the disk is full; earlier checkpoints are kept.
    """
    final = run.checkpoint_of(state.step)
    sharded = _sharded(state, is_loading=False)
    remedy = "Nothing was written, earlier checkpoints are kept. Continue from one with a lower optimizer.lr."
    _require_finite(sharded, f"checkpoint of step {state.step}", remedy)
    partial = final.with_name(f"{final.name}.partial")
    with _removed_after_failure(partial):
        _write(partial, sharded, state, origin)
        if dist.get_rank() == 0:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            _prune(run, final, keep, best)
        dist.barrier()
    return final


@contextlib.contextmanager
def _removed_after_failure(partial: Path) -> Iterator[None]:
    """Leave nothing of a checkpoint that could not be written to the end, and say so where the disk refused it.

    Raises:
        UserError: the disk is full, read-only or gone.
    """
    try:
        yield
    # torch's CheckpointException is no Exception.
    except (Exception, CheckpointException) as error:
        # torch's writer of archives tells of a full disk as of positions that it did not expect.
        refused = refused_by_disk(error) or refuses_more(partial)
        rule = refused_rule(partial, refused) if refused else ""
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        if refused is None:
            raise
        remedy = f"Earlier checkpoints are as they were. {remedy_for(refused)}"
        raise UserError(describe(str(partial), partial.name, rule, remedy)) from error


def _write(partial: Path, sharded: dict[str, Any], state: TrainingState, origin: Origin) -> None:
    """Write all files of a checkpoint, and the manifest last; they are on the disk when it returns.

    Collectives: every process of the world must call it.
    """
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    # Megatron has the writers answer through a process of its own, which a killed trainer would leave behind. A save
    # that is waited for needs none.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(sharded, str(partial), content_metadata=_METADATA)
    if dist.get_rank() == 0:
        facts = {"step": state.step, "weight_version": state.step, "manifest": manifest.NAME, **origin.facts()}
        if state.model.adaptation:
            facts["adaptation"] = dataclasses.asdict(state.model.adaptation)
        (partial / STATE_FILE).write_text(json.dumps(facts) + "\n", encoding="utf-8")
        origin.write_files(partial)
    dist.barrier()
    entries = _hash(partial)
    if dist.get_rank() == 0:
        manifest.write(partial, entries)
        _flush_to_disk(partial)


def _hash(folder: Path) -> dict[str, manifest.Entry]:
    """Size and hash of a folder's files, each found by one process: one that has just written it, where that is known.

    Collectives: one gathering.
    """
    rank, world = dist.get_rank(), dist.get_world_size()

    def owner(name: str) -> int:
        written = _WRITER.match(name)
        return int(written.group(1)) % world if written else 0

    parts: list[dict[str, manifest.Entry]] = [{} for _ in range(world)]
    mine = [name for name in manifest.files(folder) if owner(name) == rank]
    dist.all_gather_object(parts, manifest.entries(folder, mine))
    return {name: entry for part in parts for name, entry in part.items()}


def _prune(run: RunFolder, just_written: Path, keep: int, best: int) -> None:
    """Delete what is older than the ``keep`` newest intact checkpoints; a damaged one takes no intact one's place."""
    kept = 0
    for path in reversed(run.complete_checkpoints()):
        if path == just_written:
            kept += 1
        elif kept >= keep:
            if step_of(path) != best:
                shutil.rmtree(path)
        elif not manifest.damage_since(path):
            kept += 1


def newest_intact(run: RunFolder) -> manifest.Chosen | None:
    """Return the checkpoint to continue from, and what to say about it and about damaged ones; None without any.

    Collectives: every process of the world must call it; each reads a share of the files.

    Raises:
        UserError: every checkpoint is damaged.
    """
    complete = run.complete_checkpoints()
    return manifest.newest_intact(complete, _damage) if complete else None


def _damage(path: Path) -> list[str]:
    world = dist.get_world_size()
    parts: list[list[str]] = [[] for _ in range(world)]
    dist.all_gather_object(parts, manifest.damage(path, dist.get_rank(), world))
    return list(dict.fromkeys(text for part in parts for text in part))


def _require_finite(tree: Mapping[str, Any], where: str, remedy: str) -> None:
    """Refuse, on every process, a state of which any process holds a tensor with NaN or infinity.

    Collectives: one gathering.

    Raises:
        UserError: names the first such tensor.
    """
    named = [(name, t) for name, t in _tensors(tree, "") if t.is_floating_point() and t.numel()]
    # The two ends are finite where all is, and take no memory.
    ends = [torch.stack(torch.aminmax(tensor.detach())).isfinite().all().cpu() for _, tensor in named]
    first = next((name for (name, _), finite in zip(named, ends, strict=True) if not finite), None)
    firsts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(firsts, first)
    found = next((name for name in firsts if name is not None), None)
    if found is not None:
        raise UserError(describe(where, found, "this tensor holds NaN or infinity", remedy))


def _tensors(tree: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a state, described by their shards or loaded, under the names that users know."""
    if isinstance(tree, ShardedTensor | ShardedTensorFactory):
        yield from _tensors(tree.data, tree.key)
    elif isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from _tensors(value, f"{name}.{number}")


def load(path: Path, state: TrainingState) -> int:
    """Fill ``state``'s objects from a checkpoint and return the number of steps done.

    Collectives: every process of the world must call it.

    Raises:
        UserError: the checkpoint is damaged, or is of another model.
    """
    _require_same_adaptation(path, state.model.adaptation)
    with _readable(path), unpickle.restricted(path):
        step = int(read_facts(path)["step"])
        loaded = dist_checkpointing.load(_sharded(state, is_loading=True), str(path))
    _require_finite(loaded, str(path), _TAKE_ANOTHER)
    _fill(state.model.chunks, loaded["model"])
    load_optimizer_state(state.optimization.optimizer, loaded["optimizer"])
    for index, tensors in enumerate(state.teacher.tensors):
        for name, tensor in tensors.items():
            tensor.copy_(loaded["teacher"][_key(index)][name])
    return step


def load_model(path: Path, model: LocalModel) -> None:
    """Fill a model of any layout with a checkpoint's weights, or adapters, alone.

    Collectives: every process of the world must call it.

    Raises:
        UserError: the checkpoint is damaged, or is of another model.
    """
    _require_same_adaptation(path, model.adaptation)
    with _readable(path), unpickle.restricted(path):
        loaded = dist_checkpointing.load({"model": _sharded_model(model.chunks)}, str(path))
    _require_finite(loaded["model"], str(path), _TAKE_ANOTHER)
    _fill(model.chunks, loaded["model"])


def _require_same_adaptation(path: Path, ours: Adaptation | None) -> None:
    saved = read_facts(path).get("adaptation")
    found, wanted = saved or _NO_ADAPTERS, dataclasses.asdict(ours) if ours else _NO_ADAPTERS
    for name, setting in _ADAPTATION_SETTINGS.items():
        if found.get(name) != wanted.get(name):
            rule = f"{path} was made with {found.get(name)!r}"
            remedy = "Continue with what the run began with, or give another run.dir to start anew."
            raise UserError(describe(setting, wanted.get(name), rule, remedy))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn whatever reading raises into one message: Megatron and torch raise many types for a damaged file.

    torch's ``CheckpointException`` is no ``Exception``.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, CheckpointException) as error:
        detail = (str(error).splitlines() or [""])[0][:200]
        rule = f"this checkpoint can't be read into the run ({type(error).__name__}: {detail})"
        remedy = "Move it away to continue from the one before, or give another run.dir to start anew."
        raise UserError(describe(str(path), path.name, rule, remedy)) from error


def _sharded(state: TrainingState, *, is_loading: bool) -> dict[str, Any]:
    model = _sharded_model(state.model.chunks)
    # There is none before the first step, nor where every step was passed over.
    allocate_optimizer_state(state.optimization.optimizer)
    return {
        "model": model,
        "optimizer": state.optimization.optimizer.sharded_state_dict(model, is_loading, metadata=_METADATA),
        "teacher": {
            _key(index): {name: _with_data(model[_key(index)][name], tensor) for name, tensor in tensors.items()}
            for index, tensors in enumerate(state.teacher.tensors)
        },
    }


def _sharded_model(chunks: Sequence[HiddenStatesModel]) -> dict[str, Any]:
    """What of the model is saved: its adapters where it has any, for nothing else is trained then."""
    return {_key(index): sharded_adapters(chunk) or chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}


def _fill(chunks: Sequence[HiddenStatesModel], loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(chunks):
        # Only FP8 layers, of which there are none, have a further state; Transformer Engine would unpickle it.
        weights = {
            name: None if name.endswith("_extra_state") else value for name, value in loaded[_key(index)].items()
        }
        chunk.load_state_dict(weights, strict=not adapters_of(chunk))


def _key(index: int) -> str:
    """Name of a chunk's part of the state; on disk tensors are known by their place in the whole model alone."""
    return f"chunk{index}"


def _with_data(entry: ShardedTensor | ShardedTensorFactory, tensor: Any) -> ShardedTensor | ShardedTensorFactory:
    """Describe a teacher tensor by the sharding of the student's parameter of the same name."""
    changes: dict[str, Any] = {"key": f"teacher.{entry.key}", "data": tensor}
    if isinstance(entry, ShardedTensor):
        changes["dtype"] = tensor.dtype
    return dataclasses.replace(entry, **changes)


def _flush_to_disk(folder: Path) -> None:
    """Make the files durable before the rename that declares them complete."""
    for file in (*folder.rglob("*"), folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
