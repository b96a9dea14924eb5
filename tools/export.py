"""``copsd export``: a training checkpoint as a Hugging Face folder that transformers, SGLang and vLLM load."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_copsd.config.load import load_config
from megatron_copsd.config.schema import Config, ParallelSettings
from megatron_copsd.errors import UserError, describe

EXAMPLES = """examples:
  copsd export runs/copsd --out exported/step100
  copsd export runs/copsd --step 50 --dtype bfloat16 --out exported/step50
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="copsd export", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run.dir of the training")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--step", type=int, help="which checkpoint; the newest by default")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="the training's by default, which loses nothing"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing folder")
    args = parser.parse_args(argv)
    config_file = args.run / "config.yaml"
    if not config_file.is_file():
        raise UserError(
            describe("RUN", str(args.run), "the folder has no config.yaml", "Give the run.dir of a training.")
        )
    if args.out.exists() and not args.force:
        raise UserError(describe("--out", str(args.out), "exists already", "Choose another folder, or add --force."))
    config = load_config(config_file).config
    checkpoint = _checkpoint(args.run / "checkpoints", args.step)
    size = _export(config, checkpoint, args.out, args.dtype or config.model.dtype)
    print(f"wrote {args.out}: {size / 1e6:,.1f} MB of weights from {checkpoint}")
    return 0


def _checkpoint(folder: Path, step: int | None) -> Path:
    from megatron_copsd import platform

    with platform.importing_megatron():
        from megatron_copsd.model import checkpoint

    complete = checkpoint.complete(folder)
    if not complete:
        raise UserError(describe("RUN", str(folder), "there is no complete checkpoint", "Train first."))
    if step is None:
        return complete[-1]
    wanted = [path for path in complete if checkpoint.step_of(path) == step]
    if not wanted:
        have = ", ".join(str(checkpoint.step_of(path)) for path in complete)
        raise UserError(describe("--step", step, "there is no checkpoint of that step", f"There are: {have}."))
    return wanted[0]


def _export(config: Config, path: Path, out: Path, dtype: str) -> int:
    from megatron_copsd import platform

    with platform.importing_megatron():
        from megatron_copsd.hf.architecture import read_architecture
        from megatron_copsd.hf.folder import resolve_folder, write_folder
        from megatron_copsd.hf.gather import iter_hf_tensors
        from megatron_copsd.model import checkpoint, parallel
        from megatron_copsd.model.build import build_model
        from megatron_copsd.platform import DTYPES

    architecture, _ = read_architecture(config.model.path, config.model.revision)
    here = platform.start(config.parallel.timeout_s)
    # One process holds the whole model, whatever layout trained it: distributed checkpoints reshard on load.
    layout = parallel.initialize(ParallelSettings(timeout_s=config.parallel.timeout_s))
    model = build_model(architecture, config.model, layout, here.device)
    checkpoint.load_model(path, model)
    groups = layout.tensor_group, layout.pipeline_group, layout.expert_group
    tensors = iter_hf_tensors(model, architecture, *groups)
    source = resolve_folder(config.model.path, config.model.revision)
    size = write_folder(out, tensors, source, DTYPES[dtype])
    platform.stop()
    return size
