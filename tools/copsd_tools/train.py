"""``copsd train``: train a model from a configuration file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from copsd_tools.command_line.arguments import add_configuration, new_parser, positive
from copsd_tools.command_line.outputs import check_folder
from megatron_copsd.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from megatron_copsd.config.load import LoadedConfig
    from megatron_copsd.config.schema import Config, Settings

EXAMPLES = """examples:
  copsd train configs/smollm2_mgsm_sw.yaml
  copsd train configs/smollm2_mgsm_sw.yaml --nproc 3 parallel.tensor=3 optimizer.lr=1e-5
  copsd train configs/smollm2_mgsm_sw.yaml --check
  torchrun --nproc-per-node 8 -m copsd_tools.cli train CONFIG     one node of a cluster
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = new_parser("train", __doc__, EXAMPLES)
    add_configuration(parser, required=False)
    parser.add_argument("--nproc", type=positive, help="processes to start on this machine (default 1)")
    parser.add_argument(
        "--overwrite", action="store_true", help="move what an earlier run left in run.dir aside, to run.dir.1 or so"
    )
    parser.add_argument(
        "--check", action="store_true", help="check configuration, data and model, its weights aside, and stop"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print every setting and where it is from, and stop"
    )
    parser.add_argument("--help-settings", action="store_true", help="list all settings with their meaning, and stop")
    args = parser.parse_intermixed_args(argv)
    if args.help_settings:
        _print_settings()
        return 0
    if args.config is None:
        parser.error("CONFIG is required")

    from megatron_copsd.config.dump import annotate_config
    from megatron_copsd.config.load import load_config
    from megatron_copsd.worker import SAID_BY_LAUNCHER, is_finished, prepare_folder, run_worker

    loaded = load_config(args.config, args.overrides)
    rank = os.environ.get("RANK")
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if rank is not None else (args.nproc or 1)
    notes = _check_all(loaded, world_size, args.overwrite)
    if notes and rank in (None, "0") and SAID_BY_LAUNCHER not in os.environ:
        print("\n".join(notes), file=sys.stderr, flush=True)
    if args.print_config:
        print(annotate_config(loaded), end="")
        return 0
    if args.check:
        _check_data(loaded.config)
        print(f"{args.config}: valid for {world_size} process(es)")
        return 0
    if not args.overwrite and is_finished(loaded.config):
        if rank in (None, "0"):
            run = loaded.config.run
            print(f"{run.dir}: nothing to do: all {run.steps} steps are done; a larger run.steps continues")
        return 0
    if rank in (None, "0"):
        aside = prepare_folder(loaded, args.overwrite)
        if aside:
            print(f"{loaded.config.run.dir}: the earlier run is in {aside} now", flush=True)
    if rank is not None or world_size == 1:
        return run_worker(loaded.config, parser.prog)
    return _launch(loaded.config, args.config, args.overrides, world_size)


def _check_all(loaded: LoadedConfig, world_size: int, overwrite: bool) -> list[str]:
    """Collect what is wrong between settings, and between settings and model, into one error; returns what to say."""
    from megatron_copsd.config.check import check
    from megatron_copsd.worker import preflight

    check_folder(Path(loaded.config.run.dir), loaded.places.named("run.dir"))
    problems: list[str] = []
    notes: list[str] = []
    for step in (lambda: notes.extend(check(loaded)), lambda: preflight(loaded, world_size, overwrite)):
        try:
            step()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return notes


def _check_data(config: Config) -> None:
    """Read all data and make their prompts, as the run will, and show what was read and dropped."""
    from megatron_copsd.data.items import load_items
    from megatron_copsd.hf.read import read_architecture
    from megatron_copsd.hf.texts.tokenizer import load_tokenizer

    architecture = read_architecture(config.model.path, config.model.revision)
    load_items(config, load_tokenizer(config.model.path, config.model.revision, architecture.vocab_size), show=True)


def _launch(config: Config, path: str, overrides: list[str], processes: int) -> int:
    """Start the workers on this machine; the first failure ends them all and is shown first."""
    import logging

    import psutil
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from megatron_copsd.signals import SIGNALLED, Stopped, passing_on
    from megatron_copsd.worker import FAILED, FINISHED_FIRST, SAID_BY_LAUNCHER, USAGE_ERROR, say_stopped

    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what there is to know is said below
    os.environ[SAID_BY_LAUNCHER] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="copsd",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.2,
        # On one of these torch would give the workers half a minute; the others are handed on, and waited for.
        signals_to_handle="SIGQUIT",
    )
    failure = None
    first = FINISHED_FIRST if config.checkpoint.save_on_signal else "the processes end"
    with passing_on(lambda: [child.pid for child in psutil.Process().children()], first) as request:
        try:
            elastic_launch(settings, sys.executable)("-m", "copsd_tools.cli", "train", path, *overrides)
        except Stopped:
            pass
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
    # A signal may also have come to a worker alone: all of them stop together then.
    code = SIGNALLED + request.number if request.number else failure.exitcode if failure else 0
    if code > SIGNALLED:
        say_stopped("copsd train", config, code - SIGNALLED)
        return code
    if failure is None:
        return 0
    if failure.exitcode == USAGE_ERROR:
        raise UserError(_message(failure))
    print(f"copsd train: rank {rank} failed first (exit code {failure.exitcode}):", file=sys.stderr)
    print(_message(failure), file=sys.stderr)
    return FAILED


def _message(failure: ProcessFailure) -> str:
    message = failure.message
    return message if isinstance(message, str) else str(message.get("message", message))


def _print_settings() -> None:
    from megatron_copsd.config.schema import Config

    for section, field in Config.model_fields.items():
        print(f"{section}:")
        _print_section(section, field.annotation)


def _print_section(prefix: str, section: type[Settings]) -> None:
    from megatron_copsd.config.settings import parts

    for name, setting in section.model_fields.items():
        default = "required" if setting.is_required() else repr(setting.default)
        part, number = parts(setting.annotation)
        print(f"  {prefix}.{name} ({'as below' if part and not number else default})\n      {setting.description}")
        if part:
            _print_section(f"{prefix}.{name}{number}", part)
