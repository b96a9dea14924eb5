"""What a computation allocates: every tensor that it makes is watched."""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class WatchAllocations(TorchDispatchMode):
    """Largest tensor made, in elements, and most bytes alive at once, in storages made while watching."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_numel = 0
        self.peak_bytes = 0
        self._alive: dict[int, int] = {}  # storage address -> tensors on it
        self._bytes: dict[int, int] = {}
        self._seen: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf, before)
        return result

    def _watch(self, tensor: Tensor, before: set[int]) -> None:
        address = tensor.untyped_storage().data_ptr()
        known = self._seen.get(id(tensor))
        if (address in before and address not in self._bytes) or (known is not None and known.alive):
            return
        self._bytes.setdefault(address, tensor.untyped_storage().nbytes())
        self._alive[address] = self._alive.get(address, 0) + 1
        self._seen[id(tensor)] = weakref.finalize(tensor, self._release, address, id(tensor))
        self.largest_numel = max(self.largest_numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        self.peak_bytes = max(self.peak_bytes, sum(self._bytes.values()))

    def _release(self, address: int, identity: int) -> None:
        del self._seen[identity]
        self._alive[address] -= 1
        if not self._alive[address]:
            del self._alive[address], self._bytes[address]
