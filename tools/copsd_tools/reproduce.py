"""``copsd reproduce``: a recipe from its data to its numbers.

Builds the data where the file has a section sdrrl, trains, exports, evaluates the export on data.eval, and sets the
numbers beside those that were reported. Each of these is a command that can be given by itself, and is said. What is
finished is not done again, and what was stopped goes on.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from copsd_tools.command_line.arguments import add_configuration, new_parser, positive
from copsd_tools.command_line.outputs import check_folder
from copsd_tools.command_line.stages import Words, run_command
from copsd_tools.command_line.terminal import say
from megatron_copsd.errors import UserError, describe
from megatron_copsd.records.disk import read_text

if TYPE_CHECKING:
    from megatron_copsd.config.schema import Config

EXAMPLES = """examples:
  copsd reproduce configs/sdrrl_smollm2.yaml --check       what is missing, how large it is, and where it comes from
  copsd reproduce configs/sdrrl_smollm2.yaml
  copsd reproduce configs/qwen3_1.7b.yaml --nproc 8 run.dir=/scratch/qwen3
  copsd reproduce configs/sdrrl_smollm2.yaml --dry-run     the commands alone
"""
_HUB_SECONDS = 20


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = new_parser("reproduce", __doc__, EXAMPLES)
    add_configuration(parser)
    parser.add_argument("--nproc", type=positive, help="processes of the training on this machine (default 1)")
    parser.add_argument("--check", action="store_true", help="say what is there and what is missing, and stop")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and stop")
    args = parser.parse_intermixed_args(argv)

    from megatron_copsd.config.load import load_config

    loaded = load_config(args.config, args.overrides)
    check_folder(Path(loaded.config.run.dir), loaded.places.named("run.dir"))
    given = [args.config, *args.overrides]
    steps = _commands(loaded.config, given, args.nproc)
    if args.dry_run:
        for _, command in steps:
            say(f"copsd {' '.join(str(word) for word in command)}")
        return 0
    _check_needs(loaded.config, args.config)
    if args.check:
        # Training reads what a build makes, so that only the build can be checked before there is one.
        first = ["sdrrl", "build"] if loaded.config.sdrrl.dir else ["train"]
        run_command([*first, *given, "--check"])
        say(f"{args.config}: everything that it says it needs can be had")
        return 0
    for product, command in steps:
        if product is not None and product.exists():
            say(f"{product} is there already")
        else:
            run_command(command)
    _report(loaded.config)
    return 0


def _commands(config: Config, given: list[str], processes: int | None) -> list[tuple[Path | None, Words]]:
    """Return each stage's product and command; no product where the command itself sees that there is nothing to do."""
    run = Path(config.run.dir)
    commands: list[tuple[Path | None, Words]] = []
    if config.sdrrl.dir:
        commands.append((None, ["sdrrl", "build", *given]))
    commands.append((None, ["train", *given, *(["--nproc", processes] if processes else [])]))
    # A run may be continued to more steps: what was made of fewer is not this run's.
    export = run / f"hf_{config.run.steps}"
    commands.append((export, ["export", run, "--out", export]))
    if config.data.eval:
        numbers = _numbers(config)
        # Scores are of the weights that are handed on, which are the export's.
        commands.append(
            (numbers, ["evaluate", "accuracy", *given, "--model", export, "--out", numbers]),
        )
    return commands


def _numbers(config: Config) -> Path:
    return Path(config.run.dir) / f"evaluation_{config.run.steps}.json"


def _check_needs(config: Config, file: str) -> None:
    """Say what the recipe needs and whether it is there.

    Raises:
        UserError: naming all that is missing.
    """
    if config.recipe.reproduces:
        say(f"reproduces: {config.recipe.reproduces}")
    missing = []
    for need in config.recipe.needs:
        terms = f"{need.gb:g} GB; {need.licence}; {need.source}"
        for path in need.paths:
            state, found = _state(path, need.kind)
            say(f"  {'ok     ' if found else 'MISSING'}  {path}: {state}; {terms}")
            if not found:
                missing.append(describe(f"{file}: recipe.needs", path, state, f"Get it: {terms}."))
    if missing:
        raise UserError("\n".join(missing))


def _state(path: str, kind: str) -> tuple[str, bool]:
    """Say where a thing is, and whether it can be had."""
    if Path(path).exists():
        return "is here", True
    if kind == "file" or path.count("/") != 1:
        return "no such file or folder", False
    if size := _cached().get((kind, path)):
        return f"{size / 1e9:.1f} GB of it in the hub's cache", True
    from huggingface_hub import HfApi

    try:
        HfApi().repo_info(path, repo_type=kind, timeout=_HUB_SECONDS)
    except Exception as error:  # no network, no such name, a licence to accept: whatever the hub's library raises
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        return f"not here, and the hub can't be asked ({why})", False
    return "on the hub, and fetched when it is first used", True


@cache
def _cached() -> dict[tuple[str, str], int]:
    """Bytes of what is in the hub's cache, by kind and name; the cache is walked once, as it may be large."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return {(repo.repo_type, repo.repo_id): repo.size_on_disk for repo in scan_cache_dir().repos}
    except CacheNotFound:
        return {}


def _report(config: Config) -> None:
    """Set what was measured beside what was reported."""
    if not config.data.eval:
        return
    path = _numbers(config)
    try:
        numbers = json.loads(read_text(path))
        measured = [
            (name, metric, 100 * value)
            for name, metrics in numbers.items()
            for metric, value in metrics.items()
            if metric in ("accuracy", "format_rate") or "@" in metric
        ]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        rule = f"is not what copsd evaluate writes ({type(error).__name__})"
        raise UserError(describe(str(path), path.name, rule, "Remove it, and start again.")) from error
    expected = {(one.source, one.metric): one for one in config.recipe.expected}
    say("| held-out source | metric | measured, % | reported, % | by |")
    say("| --- | --- | --- | --- | --- |")
    for name, metric, value in measured:
        one = expected.get((name, metric))
        reported = (f"{one.percent:.1f}", one.reported) if one else ("-", "-")
        say(f"| {name} | {metric} | {value:.1f} | {reported[0]} | {reported[1]} |")
