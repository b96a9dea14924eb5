"""Started by a test: the bytes that autograd holds for the backward pass of a student pass, by kind of recompute.

recompute_worker.py CONFIG
"""

from __future__ import annotations

import sys
import weakref

import torch
from torch.autograd.graph import saved_tensors_hooks

from megatron_copsd import platform
from megatron_copsd.config.load import load_config

with platform.importing_megatron():
    from megatron.core import parallel_state

    from megatron_copsd.run import assemble
    from megatron_copsd.train import learn, make_samples, microbatches, teach


class Saved:
    """A tensor that autograd holds; counted by storage while it does."""

    held: dict[int, tuple[int, int]] = {}  # noqa: RUF012
    peak = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        storage = tensor.untyped_storage()
        Saved.held[id(self)] = (storage.data_ptr(), storage.nbytes())
        Saved.peak = max(Saved.peak, sum(dict(Saved.held.values()).values()))
        weakref.finalize(self, Saved.held.pop, id(self))

    def unpack(self) -> torch.Tensor:
        return self.tensor


def measure(config: str, recompute: str) -> int:
    overrides = [f"parallel.recompute={recompute}", "checkpoint.resume=false"]
    run = assemble(load_config(config, overrides).config)
    samples = make_samples(run, 0)
    student, teacher = (microbatches(run, samples, view) for view in ("student", "teacher"))
    teacher_rows = teach(run, teacher)
    Saved.peak = 0
    with saved_tensors_hooks(Saved, Saved.unpack):
        learn(run, samples, student, teacher_rows, None)
    parallel_state.destroy_model_parallel()
    platform.stop()
    return Saved.peak


def main() -> None:
    for recompute in ("none", "selective", "full"):
        print(f"{recompute}={measure(sys.argv[1], recompute)}")


if __name__ == "__main__":
    main()
