"""One rank of the processes that a test starts: counts memory and collectives of real steps, and writes them as JSON.

plan_worker.py PLAN, a JSON list of runs, one after another: {"processes", "config", "folder"}; rank r writes r.json in
the folder.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import enter_group

TRAFFIC: Counter[str] = Counter()


def _count(kind: str, tensor: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    if dist.get_world_size(group) > 1:
        TRAFFIC[kind] += tensor.nbytes


def _watch_collectives() -> None:
    """Count bytes of torch's collectives; before Megatron is imported, which takes some of them by name.

    A reduction counts what each rank puts in; a gather what each gets; a message what is sent.
    """
    all_reduce, all_gather = dist.all_reduce, dist.all_gather
    gather_tensor, scatter_tensor, messages = (
        dist.all_gather_into_tensor,
        dist.reduce_scatter_tensor,
        dist.batch_isend_irecv,
    )

    def counted_all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        _count("all_reduce", tensor, group)
        return all_reduce(tensor, op=op, group=group, async_op=async_op)

    def counted_all_gather(tensor_list, tensor, group=None, async_op=False):
        for part in tensor_list:
            _count("all_gather", part, group)
        return all_gather(tensor_list, tensor, group=group, async_op=async_op)

    def counted_gather_tensor(output_tensor, input_tensor, group=None, async_op=False):
        _count("all_gather", output_tensor, group)
        return gather_tensor(output_tensor, input_tensor, group=group, async_op=async_op)

    def counted_scatter_tensor(output, input, op=dist.ReduceOp.SUM, group=None, async_op=False):
        _count("reduce_scatter", input, group)
        return scatter_tensor(output, input, op=op, group=group, async_op=async_op)

    def counted_messages(operations):
        for operation in operations:
            if operation.op is dist.isend:
                _count("send", operation.tensor, operation.group)
        return messages(operations)

    dist.all_reduce, dist.all_gather, dist.batch_isend_irecv = counted_all_reduce, counted_all_gather, counted_messages
    dist.all_gather_into_tensor = dist._all_gather_base = counted_gather_tensor
    dist.reduce_scatter_tensor = dist._reduce_scatter_base = counted_scatter_tensor


_watch_collectives()

from megatron_copsd import platform  # noqa: E402
from megatron_copsd.config.load import load_config  # noqa: E402

with platform.importing_megatron():
    from megatron.core import parallel_state

    from megatron_copsd.run import Run, assemble
    from megatron_copsd.train import learn, make_samples, microbatches, teach


class Saved:
    """Bytes that autograd holds for backward passes, each storage once, parameters and gradient buffers aside."""

    def __init__(self, known: set[int]) -> None:
        self._known, self._users = known, Counter()
        self.held = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> object:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self._known:
            return (tensor,)
        box = _Box(tensor)
        self._users[key] += 1
        if self._users[key] == 1:
            self.held += size
            self.peak = max(self.peak, self.held)
        weakref.finalize(box, self._drop, key, size)
        return box

    def _drop(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if self._users[key] == 0:
            self.held -= size

    @staticmethod
    def unpack(box) -> torch.Tensor:
        return box[0] if isinstance(box, tuple) else box.tensor


class _Box:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def parameters(run: Run) -> Iterator[torch.nn.Parameter]:
    return itertools.chain.from_iterable(chunk.parameters() for chunk in run.model.chunks)


def step(run: Run, number: int) -> dict[str, object]:
    samples = make_samples(run, number)
    student, teacher = (microbatches(run, samples, view) for view in ("student", "teacher"))
    saved = Saved({parameter.untyped_storage().data_ptr() for parameter in parameters(run)})
    TRAFFIC.clear()
    with run.teacher.in_model():
        rows = teach(run, teacher)
        weight = run.teacher.output_weight()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        learn(run, samples, student, rows, weight)
    run.optimization.step(1)
    traffic = dict(TRAFFIC)
    shapes = {
        view: [[*batch.tokens.shape, batch.labels.shape[0]] for batch in batches]
        for view, batches in (("student", student), ("teacher", teacher))
    }
    return {"traffic": traffic, "saved": saved.peak, **shapes}


def static(run: Run) -> dict[str, int]:
    """Bytes of parameters, gradient buffers and optimizer state, storages counted once."""
    parts = getattr(run.optimization.optimizer, "chained_optimizers", [run.optimization.optimizer])
    adams = [part.optimizer for part in parts]
    moments = [
        tensor
        for adam in adams
        for state in adam.state.values()
        for name, tensor in state.items()
        if name in ("exp_avg", "exp_avg_sq")
    ]
    weights = _storages(parameters(run))
    masters = [parameter for adam in adams for group in adam.param_groups for parameter in group["params"]]
    own = [p for p in masters if p.untyped_storage().data_ptr() not in weights]
    return {
        "weights": sum(weights.values()),
        "gradients": sum(_storages(buffer.grad_data for chunk in run.ddp for buffer in chunk.buffers).values()),
        "optimizer": sum(tensor.nbytes for tensor in (*moments, *own)),
    }


def _storages(tensors) -> dict[int, int]:
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def count(config: str, folder: Path) -> None:
    run = assemble(load_config(config).config)
    layout = run.model.layout
    # The first step also asks the other processes what is then remembered (megatron-core 0.19: one flag of 4 bytes).
    step(run, 0)
    result = {**step(run, 1), **static(run), "stage": layout.pipeline_rank, "replica": layout.data_rank}
    (folder / f"{run.platform.rank}.json").write_text(json.dumps(result), encoding="utf-8")
    run.engine.close()
    parallel_state.destroy_model_parallel()
    platform.stop()


def main() -> None:
    for number, plan in enumerate(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))):
        if int(os.environ["RANK"]) < plan["processes"]:
            enter_group(number, plan["processes"])
            count(plan["config"], Path(plan["folder"]))


if __name__ == "__main__":
    main()
