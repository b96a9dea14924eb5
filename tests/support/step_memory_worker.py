"""Started by a test: one COPSD step in which every tensor that is made is measured; prints the largest.

step_memory_worker.py CONFIG
"""

from __future__ import annotations

import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_copsd import platform
from megatron_copsd.config.load import load_config

with platform.importing_megatron():
    from megatron_copsd.run import assemble
    from megatron_copsd.train import train_step


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned, and the operation."""

    elements = 0
    operation = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.numel() > self.elements:
                self.elements, self.operation = tensor.numel(), str(func)
        return out


def main() -> None:
    run = assemble(load_config(sys.argv[1]).config)
    with Largest() as largest:
        result = train_step(run, 0)
    weight = run.model.chunks[-1].output_weight.numel()
    print(f"rows={result.num_loss_tokens} vocab={run.model.shard.vocab_size} weight={weight}")
    print(f"largest={largest.elements} operation={largest.operation}")
    platform.stop()


if __name__ == "__main__":
    main()
