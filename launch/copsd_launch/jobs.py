"""What to run and where, checked before anything starts; speaks to no cluster and imports no launcher."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from megatron_copsd.errors import UserError, describe

# A leading letter, digit or slash keeps a value from being read as an option; none of these needs quoting in a shell.
_NAMES = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,-]*")
_IMAGE = re.compile(r"[A-Za-z0-9/][A-Za-z0-9_.:/@#+=-]*")
_TIME = re.compile(r"([0-9]+-)?[0-9]{1,3}:[0-5][0-9]:[0-5][0-9]")
_PATH = re.compile(r"/[A-Za-z0-9_./@+=-]*")

# nemo-run mounts the job's folder here in a container, and without one rewrites every mention of it in its scripts.
_NEMO_RUN_MOUNT = "/nemo_run"
_LONGEST_NAME = 48


@dataclass(frozen=True)
class Training:
    """One ``copsd train``, as every process of the job runs it.

    Attributes:
        config: YAML file, as given.
        overrides: ``section.key=value`` strings, as given.
        name: name of the job, safe in paths and in Slurm.
        folder: absolute folder that relative paths of the configuration start at.
        python: interpreter of the workers.
    """

    config: str
    overrides: tuple[str, ...]
    name: str
    folder: Path
    python: str

    @property
    def arguments(self) -> tuple[str, ...]:
        """Argument list of one process."""
        return (self.python, "-m", "copsd_tools.cli", "train", self.config, *self.overrides)

    def script(self) -> str:
        """Return the shell script of one process, in which every given string is quoted.

        nemo-run would pass arguments through a template engine and, locally, quotes that no shell removes; a script of
        our own is copied as it is.
        """
        return f"set -eu\ncd -- {shlex.quote(str(self.folder))}\nexec {shlex.join(self.arguments)}\n"


@dataclass(frozen=True)
class Slurm:
    """What to ask a Slurm cluster for; all values are checked on construction.

    Attributes:
        nodes: number of nodes.
        processes_per_node: processes torchrun starts on each.
        gpus_per_node: GPUs of each node; None on a cluster without.
        time: limit, [D-]HH:MM:SS.
        cpus_per_node: CPU cores of each node; None leaves it to the cluster.
        partition: partitions, comma-separated; None is the cluster's default.
        account: account to charge; None is the user's default.
        container: image that Pyxis starts; None runs in this environment, which all nodes must see.
        mounts: absolute folders or files that the container sees at the same place.

    Raises:
        UserError: with every wrong value, one a line.
    """

    nodes: int
    processes_per_node: int
    gpus_per_node: int | None
    time: str
    cpus_per_node: int | None = None
    partition: str | None = None
    account: str | None = None
    container: str | None = None
    mounts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rules = [
            ("--time", self.time, _TIME, "a limit is HH:MM:SS or D-HH:MM:SS", "For example: --time 04:00:00"),
            ("--partition", self.partition, _NAMES, "letters, digits and _ . , - only", "sinfo lists partitions."),
            ("--account", self.account, _NAMES, "letters, digits and _ . , - only", "sacctmgr lists accounts."),
            ("--container", self.container, _IMAGE, "not an image's name or path", "For example: /images/copsd.sqsh"),
            *(("--mount", m, _PATH, "an absolute path of letters, digits and _ . / @ + = -", "") for m in self.mounts),
        ]
        problems = [
            describe(where, value, rule, remedy).rstrip()
            for where, value, pattern, rule, remedy in rules
            if value is not None and not pattern.fullmatch(value)
        ]
        if self.mounts and self.container is None:
            problems.append(describe("--mount", self.mounts[0], "has no effect without --container", "Remove it."))
        if problems:
            raise UserError("\n".join(problems))


def job_name(run_name: str) -> str:
    """Return a run's name with all that could mean something to a shell, a path or Slurm taken out."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", run_name)[:_LONGEST_NAME].strip("-") or "copsd"


def check_folder(folder: Path, where: str) -> Path:
    """Return ``folder`` if nemo-run, which writes it into shell commands unquoted, can be given it.

    Raises:
        UserError: if it holds anything but letters, digits and ``_ . / @ + = -``.
    """
    if not _PATH.fullmatch(str(folder)):
        rule = "nemo-run needs an absolute path of letters, digits and _ . / @ + = -"
        raise UserError(describe(where, str(folder), rule, "Use another folder."))
    return folder


def check_mentions_no_mount(training: Training, folder: Path) -> None:
    """Refuse a job without container whose paths or settings nemo-run would rewrite.

    Raises:
        UserError: naming the first such string.
    """
    for text in (*training.arguments, str(training.folder), str(folder)):
        if _NEMO_RUN_MOUNT in text:
            rule = f"nemo-run replaces {_NEMO_RUN_MOUNT} in the scripts of jobs without --container"
            raise UserError(describe("--on slurm", text, rule, "Rename or move it."))
