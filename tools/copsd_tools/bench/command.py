"""``copsd bench``: measure the loss, packing and servers against the other ways of doing the same."""

from __future__ import annotations

from copsd_tools.command_line.dispatch import Command, CommandTable

COMMANDS = CommandTable(
    prog="copsd bench",
    usage="...",
    about="Measure the loss, packing and servers against the other ways of doing the same.",
    closing="copsd bench COMMAND --help shows a command's options and examples.",
    commands={
        "loss": Command(
            "copsd_tools.bench.kernels.loss_command",
            "fused linear divergence against dense eager autograd: time, memory, gradient error",
        ),
        "kernels": Command(
            "copsd_tools.bench.kernels.command",
            "every implementation side by side, over shapes and settings: CSV, Markdown and plots in a folder",
        ),
        "compile": Command(
            "copsd_tools.bench.compile.command",
            "registers, spills and shared memory of the Triton kernels on each GPU generation; needs no GPU",
        ),
        "rollout": Command(
            "copsd_tools.bench.servers.rollout_command",
            "tokens a second of SGLang servers, by how many requests they have at once",
        ),
        "sync": Command(
            "copsd_tools.bench.servers.sync_command",
            "seconds and GB/s of bringing a model's weights to SGLang servers, by each transport",
        ),
        "packing": Command(
            "copsd_tools.bench.packing.command",
            "padding, and seconds of both passes, of padded and packed microbatches of sampled responses",
        ),
    },
)


def main(argv: list[str]) -> int:
    """Run one of the benchmarks; returns its exit code."""
    return COMMANDS.run(argv)
