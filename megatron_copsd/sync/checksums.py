"""Whether a server holds the weights that it was sent, bit by bit: its checksums of every parameter against our own.

SGLang fuses and cuts what it is given, and says one checksum of each parameter that results (``/weights_checker``):
the start of its SHA-256 on CPUs, a sum of mixed words on GPUs. Ours are made of the full tensors on their way to the
servers. Dense models only, neither quantised nor packed: what a server rearranges has no checksum here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from megatron_copsd.rollout.engine import Bucket, Probe
from megatron_copsd.rollout.sglang.client import SglangClient

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_FUSED_OF = {part: fused for fused, parts in _FUSED.items() for part in parts}
_CUT_BY_ROWS = frozenset(("q_proj", "gate_proj", "up_proj"))
_CUT_BY_HEADS = frozenset(("k_proj", "v_proj"))  # of which there may be fewer than ranks
_CUT_BY_COLUMNS = frozenset(("o_proj", "down_proj"))
_CUT_BY_TOKENS = frozenset(("embed_tokens", "lm_head"))
_FFN = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}  # the dimension that is as long as the network is wide
_VOCABULARY_MULTIPLE = 64
_CPU_FFN_MULTIPLE = 32  # of each rank's share

_WORD = 0xFFFFFFFF
_TILE_WORDS = 8192  # each tile's sum is mixed by itself
_TILES_AT_ONCE = 512


@dataclass
class WeightChecksums:
    """What every rank of a server should say of its parameters.

    Attributes:
        ranks: of each server.
        kv_groups: key-value heads of the model.
        dtype: in which the servers hold the weights.
        on_gpu: where they hold them.
    """

    ranks: int
    kv_groups: int
    dtype: torch.dtype
    on_gpu: bool
    _expected: list[dict[str, str]] = field(default_factory=list)

    def watch(self, buckets: Iterator[Bucket], probes: Sequence[Probe]) -> Iterator[Bucket]:
        """Pass the buckets of one sync on, and forget those of the sync before."""
        self._expected = [{} for _ in range(self.ranks)]
        waiting: dict[str, dict[str, torch.Tensor]] = {}
        for bucket in buckets:
            for name, tensor in zip(bucket.names, bucket.tensors, strict=True):
                self._take(name, tensor, waiting)
            yield bucket
        assert not waiting, f"parts of {list(waiting)} never came"

    def difference(self, client: SglangClient) -> str | None:
        """Return the first parameter that a server says has other bits than were sent, and how many; None if none."""
        ranks = client.call("/weights_checker", {"action": "checksum"})["ranks"]
        said = [(info["parallelism_info"][0]["tp_rank"], info["checksums"]) for info in ranks]
        different = self.differences(said)
        if not different:
            return None
        return (
            f"{client.url} holds other bits than it was sent: {different[0]}, {len(different)} parameters in all (a "
            "server that rearranges weights is for sglang.verify=logprobs)"
        )

    def differences(self, said: Sequence[tuple[int, Mapping[str, str]]]) -> list[str]:
        """Return the parameters for which a checksum is not the expected one.

        Args:
            said: tensor-parallel rank and checksums, of every process of a server that has parameters.
        """
        different = [f"rank {rank}" for rank in range(self.ranks) if rank not in dict(said)]
        for rank, theirs in said:
            ours = self._expected[rank] if rank < self.ranks else {}
            names = sorted(ours.keys() | theirs.keys())
            different += [f"{name} (rank {rank})" for name in names if ours.get(name) != theirs.get(name)]
        return different

    def _take(self, name: str, tensor: torch.Tensor, waiting: dict[str, dict[str, torch.Tensor]]) -> None:
        """Add a tensor's checksum, or keep the tensor until those it is fused with have come."""
        module, _, kind = name.rpartition(".")  # kind: weight or bias
        parent, _, leaf = module.rpartition(".")
        fused = _FUSED_OF.get(leaf)
        if fused is None:
            parts, key = {leaf: tensor}, name
        else:
            key = f"{parent}.{fused}.{kind}"
            parts = waiting.setdefault(key, {})
            parts[leaf] = tensor
            if len(parts) < len(_FUSED[fused]):
                return
            del waiting[key]
            parts = {part: parts[part] for part in _FUSED[fused]}
        for rank, expected in enumerate(self._expected):
            cut = [self._cut(part, value, rank) for part, value in parts.items()]
            expected[key] = self._checksum(torch.cat(cut) if len(cut) > 1 else cut[0])

    def _cut(self, leaf: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        """Return a rank's share of a full tensor, as SGLang's parallel layers take it."""
        tensor = tensor.detach().to(self.dtype)
        if leaf in _CUT_BY_TOKENS:
            multiple = _VOCABULARY_MULTIPLE
            if -(-tensor.shape[0] // multiple) * multiple % self.ranks:
                multiple *= self.ranks
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, -tensor.shape[0] % multiple))
        if not self.on_gpu and leaf in _FFN:
            missing = -tensor.shape[_FFN[leaf]] % (_CPU_FFN_MULTIPLE * self.ranks)
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, missing) if _FFN[leaf] == 0 else (0, missing))
        if leaf in _CUT_BY_TOKENS or leaf in _CUT_BY_ROWS:
            return tensor.chunk(self.ranks)[rank]
        if leaf in _CUT_BY_HEADS:
            pieces = min(self.ranks, self.kv_groups)
            return tensor.chunk(pieces)[rank * pieces // self.ranks]
        if leaf in _CUT_BY_COLUMNS and tensor.dim() > 1:
            return tensor.chunk(self.ranks, dim=1)[rank]
        return tensor

    def _checksum(self, tensor: torch.Tensor) -> str:
        data = tensor.contiguous().view(-1).view(torch.uint8)
        if self.on_gpu:
            return f"{mixed_words(data):016x}"
        return hashlib.sha256(data.cpu().numpy().data).hexdigest()[:16]


def mixed_words(data: torch.Tensor, seed: int = 0x243F6A88) -> int:
    """Return SGLang's 64-bit checksum of a tensor on a GPU, of bytes [B] on any device.

    Two sums modulo 2^32 over each tile's 32-bit words, each word mixed with its position by MurmurHash3's finaliser;
    the tiles' results are added modulo 2^64 and mixed by SplitMix64's (sglang/kernels/ops/memory/gpu_tensor_hash.py of
    0.5.23). Integers of 64 bits stand in for unsigned ones of 32: products may overflow, their low halves are right.
    """
    words = torch.nn.functional.pad(data, (0, -data.numel() % 4)).view(torch.int32)
    count = words.numel()
    if count == 0:
        return 0
    seeds = (seed & _WORD, (seed * 0x9E3779B1 ^ 0xDEADBEEF) & _WORD)
    total = 0
    step = _TILE_WORDS * _TILES_AT_ONCE
    for start in range(0, count, step):
        values = words[start : start + step].long() & _WORD
        index = torch.arange(start, start + values.numel(), device=data.device)
        missing = -values.numel() % _TILE_WORDS
        halves = []
        for seed_, factor, turn in zip(seeds, (0x27D4EB2D, 0x165667B1), (15, 13), strict=True):
            place = (index * factor + seed_) & _WORD
            place ^= ((index << turn) | ((index & _WORD) >> (32 - turn))) & _WORD
            mixed = torch.nn.functional.pad(_finalised(values ^ place), (0, missing)).view(-1, _TILE_WORDS)
            halves.append(_finalised((mixed.sum(1) & _WORD) ^ (count * 4 & _WORD)))
        total += sum((high << 32) + low for high, low in zip(halves[0].tolist(), halves[1].tolist(), strict=True))
    return _split_mix(total)


def _finalised(words: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finaliser, on words in [0, 2^32) held in 64 bits."""
    words = (words ^ (words >> 16)) * 0x85EBCA6B & _WORD
    words = (words ^ (words >> 13)) * 0xC2B2AE35 & _WORD
    return words ^ (words >> 16)


def _split_mix(value: int) -> int:
    """SplitMix64's finaliser."""
    mask = (1 << 64) - 1
    value &= mask
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask
    return value ^ (value >> 31)
