"""``copsd demo``: the whole job, small: train a bilingual model, distil it crosslingually, show what it learned.

Stage 1 trains a small model from nothing with the sft objective: fluent in English, hardly taught Swahili. Stage 2 is
COPSD: the model writes answers to Swahili problems and learns from itself reading the English problem and solution.
Both run on the trainer that runs on clusters. A finished stage is not repeated.

With --methods, stage 2 is done by each of them from the same model, on equally many tokens, and the results are set
side by side.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from copsd_tools.command_line.arguments import names, new_parser, path, positive, whole
from copsd_tools.command_line.outputs import check_folder
from copsd_tools.demo.methods import METHODS, run_method
from copsd_tools.demo.report import draw_plot, show
from copsd_tools.demo.stages import CONFIGS, Folders, make_base, model_settings, processes, run_stage, source_paths
from megatron_copsd.errors import UserError, describe
from megatron_copsd.records.reader import read_metrics

EXAMPLES = """examples:
  copsd demo
  copsd demo --seed 1 --out runs/demo1
  copsd demo --fresh
  copsd demo --methods copsd,sdrrl,t-sft --seeds 3 --out runs/methods
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = new_parser("demo", __doc__, EXAMPLES)
    parser.add_argument("--out", type=path, default=Path("runs/demo"), help="folder of all artefacts")
    parser.add_argument("--seed", type=whole, default=0, help="seed of data, initialisation and sampling; the first")
    parser.add_argument("--fresh", action="store_true", help="delete --out first")
    parser.add_argument("--methods", type=names(METHODS), help=f"compare these: {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=positive, help="with --methods: so many, from --seed on (default 3)")
    args = parser.parse_args(argv)
    seeds = _seeds(args.seed, args.seeds, args.methods)
    # One seed is one demonstration.
    parts = {seed: Folders(args.out / f"seed_{seed}" if args.methods else args.out) for seed in seeds}
    for folders in parts.values():
        for folder in (args.out, folders.out, folders.data, folders.sft, folders.copsd):
            check_folder(folder, "--out")
    if args.fresh and args.out.exists():
        _clear(args.out)
    if args.methods:
        from copsd_tools.demo.comparison import report

        for seed, folders in parts.items():
            make_base(folders, seed)
            for method in args.methods:
                run_method(method, folders, seed)
        report(args.out, parts, args.methods)
    else:
        _demonstrate(parts[args.seed], args.seed)
    return 0


def _seeds(first: int, count: int | None, methods: object) -> range:
    if count is not None and methods is None:
        rule = "says how many seeds --methods compares, and --methods is not given"
        raise UserError(describe("--seeds", count, rule, "Give both, or --seed for another seed."))
    return range(first, first + (1 if methods is None else count or 3))


def _clear(out: Path) -> None:
    """Delete what the command has made."""
    from copsd_tools.demo.comparison import COMPARED

    entries = {entry.name: entry for entry in out.iterdir()}
    known = Folders(out).names | set(COMPARED) | {name for name in entries if name.startswith("seed_")}
    foreign = sorted(entries.keys() - known)
    made = [folder for folder in (out, *out.glob("seed_*")) if Folders(folder).data.is_dir()]
    if out.is_symlink() or foreign or not made:
        found = f" ({foreign[0]} is none of its parts)" if foreign else ""
        rule = f"--fresh deletes this folder, and it was not made by copsd demo alone{found}"
        raise UserError(describe("--out", str(out), rule, "Choose another folder."))
    shutil.rmtree(out)


def _demonstrate(folders: Folders, seed: int) -> None:
    minutes = make_base(folders, seed)
    settings = model_settings(folders, folders.copsd, folders.base, seed)
    settings += source_paths(folders, "train", ("sw", "en"))
    minutes["2: copsd"] = run_stage(
        folders.copsd / "hf",
        ["train", CONFIGS / "demo_copsd.yaml", *settings, *processes()],
        ["export", folders.copsd, "--out", folders.copsd / "hf"],
    )
    metrics = read_metrics(folders.copsd)
    draw_plot(folders, metrics)
    show(folders, metrics, minutes, seed)
