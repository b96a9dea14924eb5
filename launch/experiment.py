"""One training as a nemo-run experiment: shown, run here, or submitted to Slurm."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import nemo_run as run
from invoke.exceptions import UnexpectedExit
from nemo_run.config import get_nemorun_home
from nemo_run.run.torchx_backend.packaging import package

from launch.executors import local_executor, slurm_executor
from launch.jobs import Slurm, Training, check_folder, check_mentions_no_mount
from megatron_copsd.errors import UserError, describe

_TITLE = "copsd"
_TAIL_LINES = 40
_INTERRUPTED = 130


def show(training: Training, where: int | Slurm, job_dir: str | None) -> str:
    """Return the scripts of a job without running it or leaving anything behind.

    Args:
        training: what to run.
        where: processes on this machine, or a request to Slurm.
        job_dir: folder for nemo-run's files; None is nemo-run's home.

    Raises:
        UserError: if the folder can't be used.
    """
    with _experiment(training, where, job_dir) as experiment:
        try:
            experiment.dryrun(log=False, delete_exp_dir=False)
            return _scripts(experiment)
        finally:
            shutil.rmtree(_folder(experiment), ignore_errors=True)


def run_here(training: Training, processes: int, job_dir: str | None) -> int:
    """Run a job on this machine to its end, showing its output; returns 0 only if every process succeeded.

    Raises:
        UserError: if the folder can't be used.
    """
    interrupted = False
    with _experiment(training, processes, job_dir) as experiment:

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal interrupted
            interrupted = True
            experiment.cancel(training.name)

        # The processes are in a session of their own, which the terminal's Ctrl-C doesn't reach.
        with _on_signals(stop):
            experiment.run(tail_logs=True)
            # nemo-run waits for its jobs on leaving the context, and reports no failure there.
            experiment.__exit__(None, None, None)
    job = experiment.jobs[0]
    if interrupted:
        print(f"launch: interrupted; logs are under {job.executor.job_dir}", file=sys.stderr)
        return _INTERRUPTED
    if job.state.name == "SUCCEEDED":
        return 0
    print(f"launch: the job ended as {job.state.name}.\n{_end_of_log(Path(job.executor.job_dir))}", file=sys.stderr)
    return 1


def submit(training: Training, slurm: Slurm, job_dir: str | None) -> int:
    """Submit a job to the Slurm cluster of this machine and return without waiting for it.

    Raises:
        UserError: if this machine can't submit jobs, the folder can't be used or Slurm refuses the request.
    """
    if shutil.which("sbatch") is None:
        rule = "there is no sbatch on this machine"
        raise UserError(describe("--on", "slurm", rule, "Run this on a login node, or add --dryrun to see the job."))
    with _experiment(training, slurm, job_dir) as experiment:
        try:
            experiment.run(detach=True)
        except UnexpectedExit as error:
            message = error.result.stderr.strip() or f"exit code {error.result.exited}"
            raise UserError(describe("--on", "slurm", f"sbatch refused the job: {message}", "")) from error
    job = experiment.jobs[0]
    number = job.handle.partition("://")[2].split("/")[1]
    print(f"submitted Slurm job {number} ({training.name})")
    print(f"logs:    {job.executor.job_dir}/log-*_{number}_*.out")
    print(f"status:  squeue -j {number}\ncancel:  scancel {number}")
    return 0


@contextlib.contextmanager
def _experiment(training: Training, where: int | Slurm, job_dir: str | None) -> Iterator[run.Experiment]:
    """A nemo-run experiment with the training as its one job; what nemo-run says goes to stderr."""
    source = "--job-dir" if job_dir else "NEMORUN_HOME"
    base = check_folder(Path(job_dir or get_nemorun_home()).expanduser().absolute(), source)
    if isinstance(where, Slurm):
        if where.container is None:
            check_mentions_no_mount(training, base)
        else:
            check_folder(training.folder, "current directory")
        executor: run.Executor = slurm_executor(where, training, base / "experiments")
    else:
        executor = local_executor(where)
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(describe(source, str(base), str(error.strerror), "Use another folder.")) from error
    with contextlib.redirect_stdout(sys.stderr):
        experiment = run.Experiment(
            _TITLE,
            base_dir=str(base),
            log_level="WARNING",
            clean_mode=True,
            enable_goodbye_message=False,
            skip_status_at_exit=True,
        )
        with experiment:
            experiment.add(run.Script(inline=training.script()), executor=executor, name=training.name)
            yield experiment
