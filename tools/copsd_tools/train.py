"""``copsd train``: train a model from a configuration file."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from copsd_tools.command_line.arguments import add_configuration, new_parser, positive
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
    from megatron_copsd.worker import SAID_BY_LAUNCHER, is_finished, run_worker

    loaded = load_config(args.config, args.overrides)
    under_launcher = "RANK" in os.environ
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if under_launcher else (args.nproc or 1)
    notes = _check_all(loaded, world_size)
    if notes and os.environ.get("RANK", "0") == "0" and SAID_BY_LAUNCHER not in os.environ:
        print("\n".join(notes), file=sys.stderr, flush=True)
    if args.print_config:
        print(annotate_config(loaded), end="")
        return 0
    if args.check:
        _check_data(loaded.config)
        print(f"{args.config}: valid for {world_size} process(es)")
        return 0
    if is_finished(loaded.config):
        if os.environ.get("RANK", "0") == "0":
            run = loaded.config.run
            print(f"{run.dir}: nothing to do: all {run.steps} steps are done; a larger run.steps continues")
        return 0
    if under_launcher or world_size == 1:
        return run_worker(loaded.config)
    return _launch(args.config, args.overrides, world_size)


def _check_all(loaded: LoadedConfig, world_size: int) -> list[str]:
    """Collect what is wrong between settings, and between settings and model, into one error; returns what to say."""
    from megatron_copsd.config.check import check
    from megatron_copsd.worker import preflight

    problems: list[str] = []
    notes: list[str] = []
    for step in (lambda: notes.extend(check(loaded)), lambda: preflight(loaded, world_size)):
        try:
            step()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return notes


def _check_data(config: Config) -> None:
    """Read all data and make their prompts, as the run will, and show what was read and dropped."""
    from megatron_copsd import platform

    with platform.importing_megatron():
        from megatron_copsd.data.items import load_items
        from megatron_copsd.run import load_tokenizer, stop_ids

    tokenizer = load_tokenizer(config.model.path, config.model.revision)
    stop_ids(config, tokenizer)
    load_items(config, tokenizer, show=True)


def _launch(config: str, overrides: list[str], processes: int) -> int:
    """Start the workers on this machine; the first failure ends them all and is shown first."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from megatron_copsd.worker import SAID_BY_LAUNCHER

    os.environ[SAID_BY_LAUNCHER] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(settings, sys.executable)("-m", "copsd_tools.cli", "train", config, *overrides)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"copsd train: rank {rank} failed first (exit code {failure.exitcode}):", file=sys.stderr)
        print(_message(failure), file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def _message(failure: ProcessFailure) -> str:
    message = failure.message
    return message if isinstance(message, str) else str(message.get("message", message))


def _print_settings() -> None:
    from megatron_copsd.config.schema import Config, DataSource

    for section, field in Config.model_fields.items():
        print(f"{section}:")
        _print_section(section, field.annotation)
    print("each source of data.train and data.eval:")
    _print_section("data.train.0", DataSource)


def _print_section(prefix: str, section: type[Settings]) -> None:
    for name, setting in section.model_fields.items():
        default = "required" if setting.is_required() else repr(setting.default)
        print(f"  {prefix}.{name} ({default})\n      {setting.description}")
