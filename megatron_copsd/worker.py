"""One process of a run, from settings to exit code: what ``copsd train`` and torchrun start."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path

from megatron_copsd.architecture import process_multiple
from megatron_copsd.config.check import expert_problems, size_problems
from megatron_copsd.config.load import LoadedConfig
from megatron_copsd.config.schema import Config
from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.read import read_architecture
from megatron_copsd.hf.weight_files import check_weights
from megatron_copsd.records import manifest
from megatron_copsd.records.paths import RunFolder, step_of

# Set for the workers of a launcher of ours, which has checked the same and said what there is to say.
SAID_BY_LAUNCHER = "COPSD_SAID_BY_LAUNCHER"


def preflight(loaded: LoadedConfig, world_size: int) -> None:
    """Check the settings against the model's configuration and the number of processes, before any is started.

    Raises:
        UserError: with every problem found, one a line.
    """
    config, places = loaded.config, loaded.places
    problems = []
    sizes = config.parallel
    need, rule = process_multiple(sizes)
    if world_size % need:
        problems.append(describe("number of processes (--nproc)", world_size, rule, f"Use --nproc {need}."))
    try:
        architecture = read_architecture(config.model.path, config.model.revision)
        note = None if config.model.init == "random" else check_weights(config.model.path, config.model.dtype)
        if note and os.environ.get("RANK", "0") == "0" and SAID_BY_LAUNCHER not in os.environ:
            print(f"model.path ({config.model.path}): {note}", file=sys.stderr, flush=True)
    except UserError as error:
        problems.append(f"{places.of(('model', 'path'))}: {error}")
    else:
        found = [*architecture.parallel_problems(sizes), *expert_problems(config, architecture.experts > 0)]
        found += size_problems(config, architecture.vocab_size, architecture.hidden, architecture.max_positions)
        problems += [describe(places.named(setting), value, rule, remedy) for setting, value, rule, remedy in found]
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
    """Why this run must not write into its folder: it would replace, or fall behind, what an earlier one left."""
    config, places = loaded.config, loaded.places
    traces = RunFolder(Path(config.run.dir)).traces()
    if traces and not config.checkpoint.resume:
        left = ", ".join(path.name for path in traces)
        rule = f"checkpoint.resume=false would replace what an earlier run left there ({left})"
        remedy = "Set checkpoint.resume=true to continue it, give another run.dir, or move the folder away."
        return [describe(places.named("run.dir"), config.run.dir, rule, remedy)]
    if not config.checkpoint.resume:
        return []
    try:
        done = _steps_done(config)
    except UserError as error:
        return [str(error)]
    if done > config.run.steps:
        rule = f"the run in {config.run.dir} has done {done} steps"
        remedy = f"Set run.steps to {done} or more, or give another run.dir."
        return [describe(places.named("run.steps"), config.run.steps, rule, remedy)]
    return []


def run_worker(config: Config) -> int:
    """Train in this process, one of the run's; returns its exit code.

    A failure is reported at once to the launcher, which then ends the other processes: a rank that waited for this one
    in a collective would otherwise only see a time-out.
    """
    from megatron_copsd import platform

    with platform.importing_megatron():
        from megatron_copsd.run import assemble
        from megatron_copsd.train import train

    try:
        run = assemble(config)
        try:
            with run.monitor or nullcontext():
                train(run)
        finally:
            run.engine.close()
    except UserError as error:
        _report(str(error))
        raise
    except Exception:
        _report(traceback.format_exc())
        raise
    platform.stop()
    return 0


def _report(message: str) -> None:
    """Write the error where torchrun's agent looks for it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        body = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with open(path, "w", encoding="utf-8") as file:
            json.dump(body, file)
