"""One process of a run, from settings to exit code: what ``copsd train`` and torchrun start."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from contextlib import nullcontext

from megatron_copsd.architecture import process_multiple
from megatron_copsd.config.check import expert_problems
from megatron_copsd.config.load import LoadedConfig
from megatron_copsd.config.schema import Config
from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.read import read_architecture
from megatron_copsd.hf.weight_files import check_weights


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
        if note and os.environ.get("RANK", "0") == "0":
            print(f"model.path ({config.model.path}): {note}", file=sys.stderr, flush=True)
    except UserError as error:
        problems.append(f"{places.of(('model', 'path'))}: {error}")
    else:
        found = [*architecture.parallel_problems(sizes), *expert_problems(config, architecture.experts > 0)]
        problems += [describe(places.named(setting), value, rule, remedy) for setting, value, rule, remedy in found]
    if problems:
        raise UserError("\n".join(problems))


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
