"""The launcher over the real nemo-run: what it would submit, what it refuses, and a job it runs here."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from processes import PATIENCE, environment, wait_until
from tiny import make_model, settings, write_config

from copsd_launch.jobs import Slurm, Training, check_folder, job_name
from megatron_copsd.config.load import load_config
from megatron_copsd.errors import UserError

HOSTILE = (
    "run.name=a b; touch hacked & $(touch hacked) `touch hacked` $$ 'single' \"double\" | > ../x\n!#* \\ ${run.seed}"
)
SLURM = ("--on", "slurm", "--nodes", "2", "--gpus-per-node", "4", "--time", "04:00:00", "--partition", "batch")
SECRET = "not-to-be-shown"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("launch") / "model")


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A folder with problems and config.yaml, where jobs are started and nothing else is."""
    write_config(tmp_path, settings(tmp_path, model))
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "copsd_tools.cli", "launch", *arguments]


def variables(folder: Path, changes: Mapping[str, str] | None = None) -> dict[str, str]:
    secrets = {"WANDB_API_KEY": SECRET, "HF_TOKEN": SECRET}
    return {**environment(), **secrets, "NEMORUN_HOME": str(folder / "home"), **(changes or {})}


def launch(folder: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run ``copsd launch`` in ``folder`` as a user would; ``changes`` are environment variables."""
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env=variables(folder, changes),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_slurm_dry_run_prints_the_whole_job(folder: Path) -> None:
    done = launch(folder, "train", "config.yaml", HOSTILE, *SLURM, "--account", "research", "--dryrun")
    assert done.returncode == 0, done.stderr
    script = done.stdout
    for flag in (
        "--nodes=2",
        "--gpus-per-node=4",
        "--ntasks-per-node=1",
        "--time=04:00:00",
        "--partition=batch",
        "--account=research",
    ):
        assert f"#SBATCH {flag}\n" in script
    torchrun = next(line for line in script.splitlines() if " torchrun " in line)
    assert "--rdzv-backend c10d --rdzv-endpoint $head_node_ip:29500" in torchrun
    assert "--nnodes 2 --nproc-per-node 4 --node-rank $SLURM_NODEID" in torchrun
    assert str(folder / "home" / "experiments") in torchrun
    assert SECRET not in done.stdout + done.stderr
    assert not list((folder / "home").rglob("*.sh")), "a dry run keeps no scripts"

    batch, worker = script.split(": each process\n")
    assert "hacked &" not in batch
    assert "$(touch" not in batch
    # What a shell makes of the worker's script is the argument list, to the character.
    echo = worker.replace("exec ", "printf '%s\\0' ")
    words = subprocess.run(["bash", "-c", echo], capture_output=True, check=True).stdout.decode().split("\0")[:-1]
    assert words == [sys.executable, "-m", "copsd_tools.cli", "train", "config.yaml", HOSTILE]
    assert not list(folder.rglob("hacked"))


def test_container_sees_folder_and_names_of_secrets(folder: Path) -> None:
    image = "registry.example.org#team/copsd:1.0"
    done = launch(folder, "train", "config.yaml", *SLURM, "--container", image, "--mount", "/data", "--dryrun")
    assert done.returncode == 0, done.stderr
    srun = shlex.split(next(line for line in done.stdout.splitlines() if " torchrun " in line))
    assert srun[srun.index("--container-image") + 1] == image
    assert {f"{folder}:{folder}", "/data:/data"} <= set(srun[srun.index("--container-mounts") + 1].split(","))
    assert srun[srun.index("--container-env") + 1] == "WANDB_API_KEY,HF_TOKEN"
    assert srun[-1].startswith("/nemo_run/scripts/")
    assert "\nexec python3 -m copsd_tools.cli train config.yaml\n" in done.stdout
    assert SECRET not in done.stdout + done.stderr


def test_local_dry_run_prints_the_command_and_no_environment(folder: Path, tmp_path: Path) -> None:
    jobs = tmp_path / "jobs"
    done = launch(folder, "train", "config.yaml", "--on", "local", "--nproc", "2", "--job-dir", str(jobs), "--dryrun")
    assert done.returncode == 0, done.stderr
    assert "torchrun --rdzv-backend c10d --rdzv-endpoint localhost:0" in done.stdout
    assert "--nnodes 1 --nproc-per-node 2" in done.stdout
    assert str(jobs) in done.stdout
    assert SECRET not in done.stdout + done.stderr
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("config.yaml", "run.stepz=1", "--on", "local"), "Did you mean 'steps'?"),
        (("config.yaml", "optimizer.min_lr=1.0", "--on", "local"), "must not exceed optimizer.lr"),
        (("none.yaml", "--on", "local"), "no such file"),
        (("config.yaml", "--on", "local", "--nodes", "2"), "--nodes: 2: has no effect with --on local"),
        (("config.yaml", "--on", "slurm", "--gpus-per-node", "8"), "--time: is required"),
        (("config.yaml", "--on", "slurm", "--time", "01:00:00"), "--gpus-per-node: is required"),
        (("config.yaml", *SLURM, "--nproc", "2"), "one process a GPU"),
        (("config.yaml", *SLURM, "--account", "a b; touch hacked"), "--account: 'a b; touch hacked'"),
        (("config.yaml", *SLURM, "--mount", "/data"), "no effect without --container"),
        (("config.yaml", "rollout.engine=sglang", *SLURM, "--dryrun"), "sglang.host: '127.0.0.1': the run has 2 nodes"),
        (("config.yaml", *SLURM), "there is no sbatch on this machine"),
        (("config.yaml", "--on", "local", "--job-dir", "a b;touch hacked"), "--job-dir: "),
        (("config.yaml", "data.train.0.path=/nemo_run/x", *SLURM, "--dryrun"), "nemo-run replaces /nemo_run"),
        (("config.yaml", "--on", "cloud"), "invalid choice"),
        (("config.yaml", "--on", "local", "--nproc", "0"), "at least 1"),
    ],
)
def test_mistakes_are_told_without_traceback(folder: Path, arguments: tuple[str, ...], says: str) -> None:
    # No sbatch may be found even where Slurm is installed.
    done = launch(folder, "train", *arguments, PATH=str(Path(sys.executable).parent))
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(folder.rglob("hacked"))


@pytest.mark.parametrize("time_limit", ["1", "01:00", "01:60:00", "01:00:00\n", "$(id):00:00", "-1:00:00"])
def test_only_times_are_times(time_limit: str) -> None:
    with pytest.raises(UserError, match="--time"):
        Slurm(nodes=1, processes_per_node=1, gpus_per_node=None, time=time_limit)


@pytest.mark.parametrize("field", ["partition", "account", "container"])
@pytest.mark.parametrize("value", ["a b", "a;b", "$(id)", "`id`", "a\n", "-a", "'a'", ""])
def test_names_hold_nothing_a_shell_reads(field: str, value: str) -> None:
    with pytest.raises(UserError, match=f"--{field}"):
        Slurm(nodes=1, processes_per_node=1, gpus_per_node=None, time="1-00:00:00", **{field: value})


@pytest.mark.parametrize("name", ["a b", "../../etc", "$(id)", "-rf", "ü", "x" * 500, "a.b"])
def test_job_names_are_safe_in_paths(name: str) -> None:
    made = job_name(name)
    assert 0 < len(made) <= 48
    assert all(c.isascii() and (c.isalnum() or c in "_-") for c in made)
    assert not made.startswith("-")


@pytest.mark.parametrize("path", ["relative", "/a b", "/a;b", "/$HOME", "/a\nb", "/a:b", "/a,b"])
def test_folders_nemo_run_would_not_quote_are_refused(path: str) -> None:
    with pytest.raises(UserError, match="nemo-run needs"):
        check_folder(Path(path), "--job-dir")


def test_worker_script_starts_in_the_folder_it_was_launched_from(tmp_path: Path) -> None:
    folder = tmp_path / "a folder; with 'quotes'"
    folder.mkdir()
    training = Training(config="x", overrides=(), name="x", folder=folder, python="pwd")
    script = training.script().replace(shlex.join(training.arguments), "pwd")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"{folder}\n"


def test_local_job_runs_two_processes(folder: Path) -> None:
    """A hostile string survives to the run's record, and both processes took part."""
    done = launch(folder, "train", "config.yaml", HOSTILE, "run.steps=1", "--on", "local", "--nproc", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1]
    recorded = yaml.safe_load((folder / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert recorded["run"]["name"] == load_config(folder / "config.yaml", [HOSTILE]).config.run.name
    assert [path.parent.name for path in sorted((folder / "home").rglob("attempt_0/*/stdout.log"))] == ["0", "1"]
    assert "[default0]:step 1/1" in done.stdout
    assert not list(folder.rglob("hacked"))


def test_local_failure_gives_exit_code_log_and_reason(folder: Path) -> None:
    missing = folder / "no_model"
    done = launch(folder, "train", "config.yaml", f"model.path={missing}", "--on", "local", "--nproc", "2")
    assert done.returncode == 1
    assert "the job ended as FAILED" in done.stderr
    log = Path(next(line for line in done.stderr.splitlines() if "The end of" in line)[len("The end of ") : -1])
    assert str(missing) in log.read_text(encoding="utf-8")
    assert str(missing) in done.stderr
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_ended_with_all_its_processes(folder: Path, number: int) -> None:
    arguments = ("train", "config.yaml", "run.steps=100000", f"run.dir={folder / 'long'}", "--on", "local")
    with subprocess.Popen(
        command(*arguments),
        cwd=folder,
        env=variables(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout
        seen = []
        for line in process.stdout:
            seen.append(line)
            if "]:step " in line:
                break
        else:
            pytest.fail("".join(seen))
        assert workers(folder)
        process.send_signal(number)
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), output
    wait_until(lambda: not workers(folder))


def workers(folder: Path) -> list[int]:
    """Processes of the long run that are alive."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"copsd_tools.cli" in words and f"run.dir={folder / 'long'}".encode() in words:
                found.append(int(entry.name))
    return found
