"""``copsd export``: a training checkpoint as a Hugging Face folder that transformers, SGLang and vLLM load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from copsd_tools.command_line.arguments import new_parser, path, whole
from megatron_copsd.config.paths import why_no_file
from megatron_copsd.errors import UserError, describe
from megatron_copsd.records import manifest
from megatron_copsd.records.paths import RunFolder, step_of

if TYPE_CHECKING:
    from megatron_copsd.config.schema import Config

EXAMPLES = """examples:
  copsd export runs/copsd --out exported/step100
  copsd export runs/copsd --step 50 --dtype bfloat16 --out exported/step50
  copsd export runs/lora --adapter --out exported/adapter          for peft; without --adapter, base and adapter merged
"""

_BYTES = {"float32": 4, "bfloat16": 2}


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = new_parser("export", __doc__, EXAMPLES)
    parser.add_argument("run", type=path, help="run.dir of the training")
    parser.add_argument("--out", type=path, required=True, help="folder to make")
    parser.add_argument("--step", type=whole, help="which checkpoint; the newest by default")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="the training's by default, which loses nothing"
    )
    parser.add_argument("--adapter", action="store_true", help="the LoRA adapter alone, in the format of peft")
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    args = parser.parse_args(argv)
    run = RunFolder(args.run)
    if rule := why_no_file(run.config):
        rule = f"the folder has no config.yaml that can be read ({rule})"
        raise UserError(describe("RUN", str(args.run), rule, "Give the run.dir of a training."))

    from megatron_copsd.config.load import load_config

    config = load_config(run.config).config
    if args.adapter:
        _require_adapter(config)
    checkpoint, notes = _checkpoint(run, args.step)
    _check_output(
        config, run, checkpoint, args.out, args.force, None if args.adapter else args.dtype or config.model.dtype
    )
    for note in notes:
        print(note)
    size = _export(config, checkpoint, args.out, args.dtype, args.adapter)
    print(f"wrote {args.out}: {size / 1e6:,.1f} MB of weights from {checkpoint}")
    return 0


def _checkpoint(run: RunFolder, step: int | None) -> tuple[Path, list[str]]:
    complete = run.complete_checkpoints()
    if not complete:
        raise UserError(describe("RUN", str(run.checkpoints), "there is no complete checkpoint", "Train first."))
    if step is None:
        return manifest.newest_intact(complete)
    wanted = [path for path in complete if step_of(path) == step]
    if not wanted:
        have = ", ".join(str(step_of(path)) for path in complete)
        raise UserError(describe("--step", step, "there is no checkpoint of that step", f"There are: {have}."))
    return wanted[0], manifest.require_intact(wanted[0])


def _require_adapter(config: Config) -> None:
    if not config.lora.rank:
        raise UserError(describe("--adapter", True, "the run trained the whole model", "Export without --adapter."))
    if config.model.init == "random":
        rule = "the run began with random weights, which no folder holds"
        raise UserError(describe("--adapter", True, rule, "Export without --adapter."))


def _check_output(
    config: Config, run: RunFolder, checkpoint: Path, out: Path, replace: bool, dtype: str | None
) -> None:
    """Find out before the work whether the folder can be made; ``dtype`` is None of an adapter, which is small."""
    from megatron_copsd.hf.outputs import check_output, finish_swap
    from megatron_copsd.records.origin import architecture_of

    sources = {"run": run.root, "run's checkpoints": run.checkpoints}
    if Path(config.model.path).is_dir():
        sources["model that was trained (model.path)"] = Path(config.model.path)
    size = 0
    if dtype:
        size = architecture_of(config, checkpoint).parameters * _BYTES[dtype]
    if said := finish_swap(out):
        print(said)
    check_output(out, sources, replace, size)


def _export(config: Config, path: Path, out: Path, dtype: str | None, adapter_alone: bool) -> int:
    from megatron_copsd import platform
    from megatron_copsd.config.schema import ParallelSettings

    with platform.importing_megatron():
        from megatron_copsd.hf.adapter import write_adapter
        from megatron_copsd.hf.folder import resolve_folder, write_folder
        from megatron_copsd.model import parallel
        from megatron_copsd.model.gather import iter_hf_tensors
        from megatron_copsd.model.lora import peft_tensors
        from megatron_copsd.platform import DTYPES
        from megatron_copsd.records.origin import model_folder
        from megatron_copsd.run import open_model

    if config.lora.rank and dtype == "float32":
        # The sum of base and adapter would otherwise be rounded to the training's dtype first.
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    stored = DTYPES[dtype or config.model.dtype]
    here = platform.start(config.parallel.timeout_s)
    # One process holds the whole model, whatever layout trained it: distributed checkpoints reshard on load.
    layout = parallel.initialize(ParallelSettings(timeout_s=config.parallel.timeout_s))
    model = open_model(config, layout, here.device, path)
    if adapter_alone:
        size = write_adapter(out, peft_tensors(model.chunks), config.model, config.lora, stored)
    else:
        tensors = iter_hf_tensors(model.chunks, model.architecture, *layout.weight_groups)
        source = model_folder(path) or resolve_folder(config.model.path, config.model.revision)
        size = write_folder(out, tensors, source, stored)
    platform.stop()
    return size
