"""One training as a nemo-run experiment: shown, run here, or submitted to Slurm."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import nemo_run as run
from invoke.exceptions import UnexpectedExit
from nemo_run.config import get_nemorun_home
from nemo_run.run.torchx_backend.packaging import package

from copsd_launch.executors import local_executor, slurm_executor
from copsd_launch.jobs import Slurm, Training, check_folder, check_mentions_no_mount
from megatron_copsd.errors import UserError, describe
from megatron_copsd.signals import SIGNALLED, STOPPING

_TITLE = "copsd"
_TAIL_LINES = 40
_WORKER = "[default"  # what torchrun puts, with the local rank, before each line of a process


def show(training: Training, where: int | Slurm, job_dir: str | None) -> str:
    """Return the scripts of a job, without running it and without keeping them on disk.

    Args:
        training: what to run.
        where: processes on this machine, or a request to Slurm.
        job_dir: folder for nemo-run's files; None is nemo-run's home.

    Raises:
        UserError: if the folder can't be used.
    """
    experiment, executor = _create(training, where, job_dir)
    # What nemo-run says goes to stderr, here and in submit: stdout is for the scripts alone.
    with contextlib.redirect_stdout(sys.stderr), experiment:
        experiment.add(_script(training), executor=executor, name=training.name)
        try:
            experiment.dryrun(log=False, delete_exp_dir=False)
            return _scripts(experiment)
        finally:
            shutil.rmtree(experiment.jobs[0].executor.experiment_dir, ignore_errors=True)


def run_here(training: Training, processes: int, job_dir: str | None) -> int:
    """Run a job on this machine to its end, showing its output; returns 0 only if every process succeeded.

    Raises:
        UserError: if the folder can't be used.
    """
    experiment, executor = _create(training, processes, job_dir)
    interrupted = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = number
        experiment.cancel(training.name)

    # The processes are in a session of their own, which the terminal's Ctrl-C doesn't reach.
    with _on_signals(stop), experiment:
        experiment.add(_script(training), executor=executor, name=training.name)
        experiment.run(tail_logs=True)
        if interrupted:  # while the job was starting and there was nothing to cancel yet
            experiment.cancel(training.name)
        # Leaving the experiment waits for the job, and raises nothing when it fails.
    job = experiment.jobs[0]
    if interrupted:
        name = signal.Signals(interrupted).name
        print(f"launch: stopped by {name}; logs are under {job.executor.job_dir}", file=sys.stderr)
        return SIGNALLED + interrupted
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
    experiment, executor = _create(training, slurm, job_dir)
    with contextlib.redirect_stdout(sys.stderr), experiment:
        experiment.add(_script(training), executor=executor, name=training.name)
        try:
            experiment.run(detach=True)
        except UnexpectedExit as error:
            message = error.result.stderr.strip() or f"exit code {error.result.exited}"
            rule = f"sbatch refused the job: {message}"
            raise UserError(describe("--on", "slurm", rule, "Change the request.")) from error
    job = experiment.jobs[0]
    number = job.handle.partition("://")[2].split("/")[1]
    print(f"submitted Slurm job {number} ({training.name})")
    print(f"logs:    {job.executor.job_dir}/log-*_{number}_*.out")
    print(f"status:  squeue -j {number}\ncancel:  scancel {number}")
    return 0


def _create(training: Training, where: int | Slurm, job_dir: str | None) -> tuple[run.Experiment, run.Executor]:
    """Return an empty experiment and the executor of its job, the folder of both checked and made."""
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
        raise UserError(describe(source, str(base), error.strerror or str(error), "Use another folder.")) from error
    experiment = run.Experiment(
        _TITLE,
        base_dir=str(base),
        log_level="WARNING",
        clean_mode=True,
        enable_goodbye_message=False,
        skip_status_at_exit=True,
    )
    return experiment, executor


def _script(training: Training) -> run.Script:
    return run.Script(inline=training.script())


def _scripts(experiment: run.Experiment) -> str:
    """What was prepared for the experiment's one job: who starts the processes, and what each of them runs."""
    job = experiment.jobs[0]
    folder = Path(job.executor.job_dir)
    if isinstance(job.executor, run.SlurmExecutor):
        batch = folder.parent / f"{job.id}_sbatch.sh"
        starter = f"# {batch}\n{batch.read_text(encoding='utf-8')}"
    else:
        # nemo-run's own way to show a local job prints the whole environment, secrets too.
        role = package(job.id, job.task, executor=job.executor, serialize_metadata_for_scripts=False).roles[0]
        starter = f"# command on this machine\n{' '.join((role.entrypoint, *role.args))}\n"
    worker = folder / "scripts" / f"{job.id}.sh"
    return f"{starter.rstrip()}\n\n# {worker}: each process\n{worker.read_text(encoding='utf-8')}"


def _end_of_log(folder: Path) -> str:
    """Where the log of a local job is, and the last lines that its processes, rather than torchrun, wrote into it."""
    logs = sorted(folder.glob("*/*/*/*/combined.log"), key=lambda path: path.stat().st_mtime)
    if not logs:
        return f"It wrote no log under {folder}."
    lines = logs[-1].read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line for line in lines if line.startswith(_WORKER)] or lines
    return "\n".join((f"The end of {logs[-1]}:", *(f"  {line}" for line in lines[-_TAIL_LINES:])))


@contextlib.contextmanager
def _on_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have the handler called on the signals that ask a program to end, for as long as the context lasts."""
    before = {number: signal.signal(number, handler) for number in STOPPING}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
