"""Options that ``copsd bench loss`` and ``copsd bench kernels`` share, and types of theirs."""

from __future__ import annotations

import argparse

from copsd_tools.command_line.arguments import above_zero, positive, share, whole


def add_loss_options(parser: argparse.ArgumentParser) -> None:
    """Add the settings of the loss and of its inputs that have a default in both commands."""
    parser.add_argument("--jsd-weight", type=share, default=0.5, help="teacher's weight in jsd (default %(default)s)")
    parser.add_argument("--temperature", type=above_zero, default=1.0, help="divides the logits (default %(default)s)")
    parser.add_argument("--frozen-weight", action="store_true", help="no gradient for the weight, as under LoRA")
    parser.add_argument("--threads", type=positive, help="torch threads (default: torch's)")
    parser.add_argument("--seed", type=whole, default=0, help="seed of the inputs (default %(default)s)")


def shape(text: str) -> tuple[int, int, int]:
    """Type of an argument: R,H,V."""
    try:
        rows, hidden, vocab = (positive(number) for number in text.split(","))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: must be R,H,V, three whole numbers of at least 1") from error
    return rows, hidden, vocab


def clip(text: str) -> float | None:
    """Type of an argument: a cap in nats, or none."""
    try:
        return None if text == "none" else above_zero(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or none") from error
