"""``copsd launch``: train on this machine or on a Slurm cluster, through nemo-run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from copsd_launch.jobs import Slurm, Training, job_name
from copsd_tools.command_line.arguments import add_configuration, new_parser, path, positive
from copsd_tools.command_line.outputs import check_folder
from megatron_copsd.errors import UserError, describe

EXAMPLES = """examples:
  copsd launch train configs/demo_copsd.yaml --on local --nproc 2
  copsd launch train configs/demo_copsd.yaml optimizer.lr=1e-5 --on local --dryrun
  copsd launch train configs/smollm2_mgsm_sw.yaml --on slurm --nodes 2 --gpus-per-node 8 --time 04:00:00 \\
      --partition batch --account research --container /images/copsd.sqsh --mount /data --job-dir /shared/jobs

Run it on a login node for --on slurm. --job-dir, or else the environment variable NEMORUN_HOME (default ~/.nemo_run),
is where nemo-run keeps scripts and logs; the nodes of a cluster must see it and the current directory. A container has
this package installed. WANDB_API_KEY and HF_TOKEN are taken from the environment.
"""


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code: 0 done, 1 the job failed, 128 + n a signal's."""
    args = _parser().parse_intermixed_args(argv)

    from megatron_copsd.config.check import check, check_nodes
    from megatron_copsd.config.load import load_config

    loaded = load_config(args.config, args.overrides)
    check(loaded)
    where = _slurm(args) if args.on == "slurm" else _local(args)
    if isinstance(where, Slurm):
        check_nodes(loaded.config, where.nodes)
    in_container = isinstance(where, Slurm) and where.container is not None
    training = Training(
        config=args.config,
        overrides=tuple(args.overrides),
        name=job_name(loaded.config.run.name),
        folder=Path.cwd(),
        python="python3" if in_container else sys.executable,
    )
    if args.job_dir:
        check_folder(args.job_dir, "--job-dir")
    # nemo-run takes seconds to import; mistakes are told before.
    from copsd_launch.experiment import run_here, show, submit

    if args.dryrun:
        print(show(training, where, args.job_dir), end="")
        return 0
    if isinstance(where, Slurm):
        return submit(training, where, args.job_dir)
    return run_here(training, where, args.job_dir)


def _slurm(args: argparse.Namespace) -> Slurm:
    processes = args.gpus_per_node or args.nproc
    problems = []
    if args.time is None:
        problems.append("--time: is required with --on slurm. For example: --time 04:00:00")
    if processes is None:
        problems.append("--gpus-per-node: is required with --on slurm (or --nproc on a cluster without GPUs). Add it.")
    if args.gpus_per_node is not None and args.nproc is not None:
        rule = f"there is one process a GPU, and --gpus-per-node is {args.gpus_per_node}"
        problems.append(describe("--nproc", args.nproc, rule, "Remove it."))
    if problems:
        raise UserError("\n".join(problems))
    return Slurm(
        nodes=args.nodes or 1,
        processes_per_node=processes,
        gpus_per_node=args.gpus_per_node,
        time=args.time,
        cpus_per_node=args.cpus_per_node,
        partition=args.partition,
        account=args.account,
        container=args.container,
        mounts=tuple(args.mount),
    )


def _local(args: argparse.Namespace) -> int:
    """Return the number of processes, having refused what only a cluster understands."""
    only_slurm = ("nodes", "gpus_per_node", "cpus_per_node", "partition", "account", "time", "container", "mount")
    problems = [
        describe(f"--{name.replace('_', '-')}", getattr(args, name), "has no effect with --on local", "Remove it.")
        for name in only_slurm
        if getattr(args, name)
    ]
    if problems:
        raise UserError("\n".join(problems))
    return args.nproc or 1


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("launch", __doc__, EXAMPLES, allow_abbrev=False)
    parser.add_argument("command", choices=["train"])
    add_configuration(parser)
    parser.add_argument("--on", required=True, choices=["local", "slurm"], help="this machine, or its Slurm cluster")
    parser.add_argument("--dryrun", action="store_true", help="print the scripts of the job and stop; needs no cluster")
    parser.add_argument("--job-dir", metavar="DIR", type=path, help="folder of nemo-run's scripts and logs")
    parser.add_argument("--nproc", type=positive, metavar="N", help="processes a machine (default with local: 1)")
    slurm = parser.add_argument_group("with --on slurm")
    slurm.add_argument("--nodes", type=positive, metavar="N", help="number of nodes (default 1)")
    slurm.add_argument("--gpus-per-node", type=positive, metavar="G", help="GPUs, and processes, of each node")
    slurm.add_argument("--cpus-per-node", type=positive, metavar="C", help="CPU cores of each node")
    slurm.add_argument("--time", metavar="[D-]HH:MM:SS", help="time limit")
    slurm.add_argument("--partition", metavar="P", help="partition (default: the cluster's)")
    slurm.add_argument("--account", metavar="A", help="account to charge (default: yours)")
    slurm.add_argument("--container", metavar="IMAGE", help="image for Pyxis (default: none, this environment)")
    slurm.add_argument("--mount", action="append", default=[], metavar="PATH", help="seen by the container; repeatable")
    return parser
