"""Weights through files: a Hugging Face folder that every server reads.

Nothing is forced to the disk: a reader elsewhere sees what was closed before it opens it, and the next run starts anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_copsd.errors import UserError, describe
from megatron_copsd.rollout.engine import Bucket
from megatron_copsd.rollout.sglang.client import SglangClient

_UNFINISHED = ".unfinished"


class DiskTransport:
    """Writes a folder for each version, complete or absent, and has the servers load it; keeps the newest."""

    def __init__(self, folder: Path, model: Path, seconds: float) -> None:
        """Take the folder that the versions go into.

        Args:
            folder: of this run alone; removed at its end.
            model: folder of the weights' other files.
            seconds: that a server may take to load.
        """
        self.folder, self._model, self._seconds = folder.absolute(), model, seconds

    def push(
        self,
        buckets: Iterator[Bucket],
        weight_version: int,
        clients: Sequence[SglangClient],
        *,
        flush_cache: bool = True,
    ) -> None:
        """See ``Transport.push``."""
        target = self.folder / f"version_{weight_version}"
        unfinished = target.with_name(target.name + _UNFINISHED)
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            self._write(unfinished, buckets)
            shutil.rmtree(target, ignore_errors=True)  # of an attempt that the servers did not survive
            unfinished.rename(target)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            rule = f"weights could not be written: {error}"
            raise UserError(
                describe("sglang.folder", str(self.folder), rule, "Make room, or choose another.")
            ) from error
        body = {"model_path": str(target), "weight_version": str(weight_version), "flush_cache": flush_cache}
        with ThreadPoolExecutor(max_workers=len(clients)) as pool:
            list(pool.map(lambda client: client.call("/update_weights_from_disk", body, self._seconds), clients))
        for other in self.folder.glob("version_*"):
            if other != target:
                shutil.rmtree(other, ignore_errors=True)

    def close(self) -> None:
        """Remove the folder: checkpoints are kept elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, folder: Path, buckets: Iterator[Bucket]) -> None:
        places: dict[str, str] = {}
        for number, bucket in enumerate(buckets, start=1):
            file = f"model-{number:05d}.safetensors"
            tensors = {n: t.detach().cpu().contiguous() for n, t in zip(bucket.names, bucket.tensors, strict=True)}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(bucket.names, file)
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        for text in self._model.glob("*.json"):
            if not text.name.endswith(".index.json"):
                shutil.copy(text, folder)
