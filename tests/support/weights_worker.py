"""One rank of the processes that a test starts: HF -> Megatron -> HF is the identity, and logits are transformers'.

weights_worker.py TRIPS, a JSON list of layouts one after another: {"name", "processes", "parallel", "models"}, where
``parallel`` is the section of the settings and ``models`` are pairs of dtype and folder.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import enter_group
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_copsd import platform
from megatron_copsd.config.schema import ModelSettings, ParallelSettings
from megatron_copsd.hf.folder import TensorReader, write_folder
from megatron_copsd.hf.read import read_architecture

with platform.importing_megatron():
    from megatron.core import parallel_state

    from megatron_copsd.model import parallel
    from megatron_copsd.model.build import build_model
    from megatron_copsd.model.gather import iter_hf_tensors
    from megatron_copsd.model.weights import load_weights

TEXT = (
    "Joho hutumia komeo 2 za ufumwele wa buluu na nusu ya kiasi hicho cha ufumwele mweupe. "
    "Huwa inatumia jumla ya komeo ngapi? A robe takes 2 bolts of blue fiber and half that much white fiber."
)


def check(folder: Path, layout: parallel.Layout, dtype: str) -> bool:
    """Returns whether the logits were compared too, which takes a whole model in float32."""
    architecture = read_architecture(str(folder))
    chunks = build_model(architecture, ModelSettings(path=str(folder), dtype=dtype), layout, torch.device("cpu"))
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))  # whatever is not loaded must show
    reader = TensorReader(folder)
    load_weights(chunks, architecture, reader, layout.tensor_rank, layout.tensor_size)
    tensors = dict(iter_hf_tensors(chunks, architecture, *layout.weight_groups))
    stored = {name: tensor.to(reader.get(name).dtype) for name, tensor in tensors.items()}
    assert stored.keys() == reader.names(), stored.keys() ^ reader.names()
    for name, tensor in stored.items():
        assert torch.equal(tensor, reader.get(name)), f"{folder.name}: {name} changed"
    out = folder.with_name(f"{folder.name}-again-{layout.tensor_size}-{layout.pipeline_size}-{layout.settings.expert}")
    if dist.get_rank() == 0:
        write_folder(out, iter(tensors.items()), folder, next(iter(stored.values())).dtype)
        again = TensorReader(out)
        assert all(torch.equal(again.get(name), reader.get(name)) for name in reader.names())
        AutoModelForCausalLM.from_pretrained(out)
    whole = layout.tensor_size == layout.pipeline_size == 1 and dtype == "float32"
    if whole:
        compare_logits(chunks[0], folder, architecture.vocab_size)
    return whole


def compare_logits(model, folder: Path, vocab_size: int) -> None:
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(TEXT).input_ids])
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = (model(ids, positions, None).transpose(0, 1) @ model.output_weight.T)[..., :vocab_size]
        worst = float((logits - reference(ids).logits).abs().max())
    print(f"{folder.name}: largest difference of logits {worst:.2e}", flush=True)
    assert worst < 1e-4


def main() -> None:
    rank = int(os.environ["RANK"])
    for number, trip in enumerate(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))):
        if rank >= trip["processes"]:
            continue
        enter_group(number, trip["processes"])
        settings = ParallelSettings.model_validate(trip["parallel"])
        platform.start(settings.timeout_s)
        layout = parallel.initialize(settings)
        compared = sum(check(Path(folder), layout, dtype) for dtype, folder in trip["models"])
        parallel_state.destroy_model_parallel()
        platform.stop()
        print(f"done: {trip['name']}, logits of {compared}", flush=True)


if __name__ == "__main__":
    main()
