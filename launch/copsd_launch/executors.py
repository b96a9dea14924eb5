"""nemo-run executors of the places a training can run."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import nemo_run as run

from copsd_launch.jobs import Slurm, Training
from megatron_copsd.signals import LAUNCHED_BY

# Passed on by name; their values stand in no script and no log of ours.
SECRETS = ("WANDB_API_KEY", "HF_TOKEN")

# nemo-run would have torchrun log at INFO, fifty lines a job.
_LOG_LEVEL = "WARNING"


def local_executor(processes: int) -> run.LocalExecutor:
    """Return the executor of ``processes`` processes on this machine, under torchrun."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    variables = {
        "PATH": f"{_scripts_folder()}{os.pathsep}{os.environ.get('PATH', '')}",
        "LOGLEVEL": os.environ.get("LOGLEVEL", _LOG_LEVEL),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        LAUNCHED_BY: str(os.getpid()),
    }
    return run.LocalExecutor(launcher="torchrun", ntasks_per_node=processes, env_vars=variables)


def slurm_executor(slurm: Slurm, training: Training, experiments: Path) -> run.SlurmExecutor:
    """Return the executor of a Slurm job submitted from this machine; one torchrun a node starts the processes.

    Args:
        slurm: what to ask for.
        training: the job; its folder is mounted into a container.
        experiments: folder of nemo-run's experiments, on a file system that all nodes see.
    """
    in_container = slurm.container is not None
    mounts = dict.fromkeys((str(training.folder), *slurm.mounts)) if in_container else {}
    return run.SlurmExecutor(
        account=slurm.account,
        partition=slurm.partition,
        job_name_prefix="copsd.",
        time=slurm.time,
        nodes=slurm.nodes,
        ntasks_per_node=slurm.processes_per_node,
        gpus_per_node=slurm.gpus_per_node,
        cpus_per_task=slurm.cpus_per_node,  # one task a node: torchrun
        # srun stopped taking this over from sbatch with Slurm 22.05.
        srun_args=[f"--cpus-per-task={slurm.cpus_per_node}"] if slurm.cpus_per_node else [],
        container_image=slurm.container,
        container_mounts=[f"{path}:{path}" for path in mounts],
        container_env=[name for name in SECRETS if name in os.environ] if in_container else None,
        setup_lines=None if in_container else f'export PATH={shlex.quote(str(_scripts_folder()))}:"$PATH"',
        env_vars={"LOGLEVEL": shlex.quote(os.environ.get("LOGLEVEL", _LOG_LEVEL))},
        launcher="torchrun",
        packager=run.Packager(),  # the code is installed where the job runs
        tunnel=run.LocalTunnel(job_dir=str(experiments)),
        poll_estimated_start_time=False,
    )


def _scripts_folder() -> Path:
    """Folder of this environment's torchrun, which is found on PATH only where the environment is activated."""
    return Path(sys.executable).parent
