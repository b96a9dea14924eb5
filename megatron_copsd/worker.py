"""One process of a run, from settings to exit code: what ``copsd train`` and torchrun start."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from contextlib import nullcontext, suppress
from pathlib import Path

from megatron_copsd.architecture import process_multiple
from megatron_copsd.config.check import expert_problems, size_problems
from megatron_copsd.config.load import LoadedConfig, load_config
from megatron_copsd.config.resume import changes
from megatron_copsd.config.schema import Config
from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.read import read_architecture
from megatron_copsd.hf.weight_files import check_weights
from megatron_copsd.records import manifest
from megatron_copsd.records.claim import claimed, move_aside
from megatron_copsd.records.origin import compare, read_facts
from megatron_copsd.records.paths import RunFolder, step_of
from megatron_copsd.records.reader import recorded_lines
from megatron_copsd.signals import (
    SIGNALLED,
    Stopped,
    StopRequest,
    end_forks_with_this,
    end_with_launcher,
    end_with_parent,
    stop_request,
)

# Set, to its process number, for the workers of a launcher of ours, which has checked the same and said what there is
# to say.
SAID_BY_LAUNCHER = "COPSD_SAID_BY_LAUNCHER"
FINISHED_FIRST = "the step in hand is finished and saved first"
USAGE_ERROR, FAILED = 2, 1
# How often a job was started again, as torchrun and Slurm say it.
_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def preflight(loaded: LoadedConfig, world_size: int, overwrite: bool = False) -> None:
    """Check settings against the model's configuration, the processes and the run's folder, before any is started.

    Args:
        loaded: settings.
        world_size: number of processes.
        overwrite: what an earlier run left in the folder is to be moved aside.

    Raises:
        UserError: with every problem found, one a line.
    """
    from megatron_copsd.data.items import check_texts

    config, places = loaded.config, loaded.places
    problems = []
    sizes = config.parallel
    need, rule = process_multiple(sizes)
    if world_size % need:
        problems.append(describe("number of processes (--nproc)", world_size, rule, f"Use --nproc {need}."))
    try:
        architecture = read_architecture(config.model.path, config.model.revision)
        note = None
        if config.model.init != "random":
            note = check_weights(config.model.path, architecture, config.model.dtype)
        if note and os.environ.get("RANK", "0") == "0" and SAID_BY_LAUNCHER not in os.environ:
            print(f"model.path ({config.model.path}): {note}", file=sys.stderr, flush=True)
    except UserError as error:
        problems.append(f"{places.of(('model', 'path'))}: {error}")
    else:
        found = [*architecture.parallel_problems(sizes), *expert_problems(config, architecture.experts > 0)]
        found += size_problems(config, architecture.vocab_size, architecture.hidden, architecture.max_positions)
        problems += [describe(places.named(setting), value, rule, remedy) for setting, value, rule, remedy in found]
        try:
            check_texts(config, architecture)
        except UserError as error:
            problems.append(str(error))
    if not overwrite and os.environ.get("RANK", "0") == "0":
        problems += _folder_problems(loaded)
    if problems:
        raise UserError("\n".join(problems))


def is_finished(config: Config) -> bool:
    """Whether the run that would be continued has already done every step."""
    return config.checkpoint.resume and _steps_done(config) == config.run.steps


def _steps_done(config: Config) -> int:
    """Steps of the checkpoint that the run would continue from; where the newest has fewer than ``run.steps``, of that.

    Only files that were changed since they were written are read: here a hidden fault costs nothing, as nothing is
    trained from it.

    Raises:
        UserError: every checkpoint is damaged.
    """
    complete = RunFolder(Path(config.run.dir)).complete_checkpoints()
    if not complete or step_of(complete[-1]) < config.run.steps:
        return step_of(complete[-1]) if complete else 0
    return step_of(manifest.newest_intact(complete, manifest.damage_since).path)


def _folder_problems(loaded: LoadedConfig) -> list[str]:
    """Why this run must not write into its folder: it would replace, or not fit, what an earlier one left."""
    config, places = loaded.config, loaded.places
    folder = RunFolder(Path(config.run.dir))
    if obstacles := folder.obstacles():
        return obstacles
    traces = folder.traces()
    if traces and not config.checkpoint.resume:
        left = ", ".join(path.name for path in traces)
        rule = f"checkpoint.resume=false would replace what an earlier run left there ({left})"
        remedy = "Set checkpoint.resume=true to continue it, give another run.dir, or move it aside with --overwrite."
        return [describe(places.named("run.dir"), config.run.dir, rule, remedy)]
    if not config.checkpoint.resume:
        return []
    try:
        done = _steps_done(config)
        problems = _other_settings(folder, loaded)
        recorded_lines(folder.metrics)
    except UserError as error:
        return [str(error)]
    if done > config.run.steps:
        rule = f"the run in {config.run.dir} has done {done} steps"
        remedy = f"Set run.steps to {done} or more, or give another run.dir."
        problems.append(describe(places.named("run.steps"), config.run.steps, rule, remedy))
    return problems


def _other_settings(folder: RunFolder, loaded: LoadedConfig) -> list[str]:
    """Why a run is not to be continued with these settings, or begun again where it has left no checkpoint."""
    complete = folder.complete_checkpoints()
    for checkpoint in reversed(complete):
        with suppress(UserError):  # a damaged one is passed over, and named, when it is looked through
            read_facts(checkpoint)
            return list(compare(checkpoint, loaded.config).problems)
    if complete or not folder.config.exists():
        return []
    before = load_config(folder.config).config.model_dump(mode="json")
    changed = [change for change in changes(before, loaded.config) if change.refused]
    remedy = "Give another run.dir, or move the folder aside with --overwrite."
    return [
        describe(loaded.places.named(setting), now, f"{folder.config} was begun with {then!r}", remedy)
        for setting, then, now, _ in changed
    ]


def prepare_folder(loaded: LoadedConfig, overwrite: bool) -> Path | None:
    """Find out, before any process is started, that the run's folder is free; returns where an earlier run was moved.

    A job that its launcher or cluster starts again must not move its own beginning aside.

    Raises:
        UserError: another run holds the folder, or it can't be written or moved.
    """
    folder = RunFolder(Path(loaded.config.run.dir))
    again = any(int(os.environ.get(name) or 0) for name in _RESTARTS)
    if overwrite and not again and folder.traces():
        return move_aside(folder)
    with claimed(folder):
        return None


def run_worker(config: Config, command: str) -> int:
    """Train in this process, one of the run's; returns its exit code: 0, or 128 and the signal it was stopped by.

    A failure is reported at once to the launcher, which then ends the other processes: a rank that waited for this one
    in a collective would otherwise only see a time-out.

    Args:
        config: settings.
        command: what errors call the program.
    """
    launcher = os.environ.get(SAID_BY_LAUNCHER)
    if "RANK" in os.environ:
        end_with_parent(int(launcher) if launcher else None)
    end_with_launcher()
    end_forks_with_this()
    is_main = os.environ.get("RANK", "0") == "0"
    folder = RunFolder(Path(config.run.dir))
    with stop_request(quiet=bool(launcher) or not is_main) as request:
        try:
            with claimed(folder) if is_main else nullcontext():
                number = _train(config, request)
        except Stopped as stopped:
            number = stopped.number
        except Exception as error:
            wrong = isinstance(error, UserError)
            _report(str(error) if wrong else traceback.format_exc())
            if not launcher:
                raise
            return USAGE_ERROR if wrong else FAILED  # the launcher shows it, once
    if number and is_main and not launcher:
        say_stopped(command, config, number)
    return SIGNALLED + number if number else 0


def say_stopped(command: str, config: Config, number: int) -> None:
    """Tell the user by which signal a run was stopped, and what is left of it."""
    kept = RunFolder(Path(config.run.dir)).complete_checkpoints()
    what = f"{kept[-1]} is kept, and the same command continues from it" if kept else "no checkpoint was written yet"
    print(f"{command}: stopped by {signal.Signals(number).name}: {what}", file=sys.stderr, flush=True)


def _train(config: Config, request: StopRequest) -> int:
    from megatron_copsd import platform

    with platform.importing_megatron():
        from megatron_copsd.run import assemble
        from megatron_copsd.train import train

    run = assemble(config)
    try:
        patience = request.after(FINISHED_FIRST) if config.checkpoint.save_on_signal else nullcontext()
        with patience, run.monitor or nullcontext():
            number = train(run, request)
    finally:
        run.engine.close()
    platform.stop()
    return number


def _report(message: str) -> None:
    """Write the error where torchrun's agent looks for it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        body = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with open(path, "w", encoding="utf-8") as file:
            json.dump(body, file)
