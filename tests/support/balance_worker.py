"""One rank of the processes that a test starts: the gradient of the load-balancing loss against transformers' router.

balance_worker.py FOLDER: by one process, then with the experts spread over two.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from ranks import enter_group
from transformers import AutoModelForCausalLM

from megatron_copsd import platform
from megatron_copsd.config.schema import ModelSettings, ParallelSettings
from megatron_copsd.data.batches.batching import microbatch
from megatron_copsd.hf.folder import TensorReader, resolve_folder
from megatron_copsd.hf.read import read_architecture
from megatron_copsd.types import Problem, PromptPair, Rollout, Sample

with platform.importing_megatron():
    from megatron.core import parallel_state

    from megatron_copsd.model import parallel
    from megatron_copsd.model.build import build_model, wrap_for_training
    from megatron_copsd.model.passes import RowLoss, student_pass
    from megatron_copsd.model.weights import load_weights

PROCESSES = (1, 2)
TIMEOUT = 120.0
COEFFICIENT = 0.5
LENGTHS = ((5, 9), (11, 3), (2, 2), (7, 12))  # of prompts and responses
MICROBATCHES = ((0, 1), (2, 3))


def sample(index: int, vocab_size: int) -> Sample:
    prompt, response = LENGTHS[index]
    ids = torch.randint(vocab_size, (prompt + response,), generator=torch.Generator().manual_seed(index)).tolist()
    pair = PromptPair(Problem("x", "SWA", "?"), tuple(ids[:prompt]), (0,))
    return Sample(pair, Rollout(tuple(ids[prompt:]), (0.0,) * response, "stop", 0, ""), index)


def expected_gradients(folder: str, samples: list[Sample]) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    total = sum(map(sum, LENGTHS))
    loss = torch.zeros(())
    for members in MICROBATCHES:
        logits: list[list[torch.Tensor]] = [[] for _ in range(config.num_hidden_layers)]
        for index in members:
            ids = samples[index].pair.student_prompt + samples[index].rollout.response
            found = model(torch.tensor([ids]), output_router_logits=True).router_logits
            for layer, of_layer in zip(logits, found, strict=True):
                layer.append(of_layer)
        for layer in logits:
            probabilities = torch.cat(layer).softmax(-1)
            chosen = probabilities.topk(config.num_experts_per_tok).indices
            share = torch.nn.functional.one_hot(chosen, config.num_experts).double().mean(dim=(0, 1)).float()
            balance = config.num_experts * (share * probabilities.mean(dim=0)).sum()
            loss = loss + COEFFICIENT * balance * len(probabilities) / total
    loss.backward()
    layers = model.model.layers
    return {
        "decoder.layers.0.mlp.router.weight": layers[0].mlp.gate.weight.grad,
        "decoder.layers.1.mlp.router.weight": layers[1].mlp.gate.weight.grad,
        "decoder.layers.0.self_attention.linear_proj.weight": layers[0].self_attn.o_proj.weight.grad,
    }


def check(folder: str, experts: int) -> None:
    here = platform.start(TIMEOUT)
    layout = parallel.initialize(ParallelSettings(expert=experts, timeout_s=TIMEOUT))
    architecture = read_architecture(folder)
    settings = ModelSettings(path=folder, dtype="float32", moe_aux_loss=COEFFICIENT)
    chunks = build_model(architecture, settings, layout, here.device)
    load_weights(chunks, architecture, TensorReader(resolve_folder(folder)), 0, 1)
    ddp = wrap_for_training(chunks, distributed_optimizer=False, overlap=False)
    samples = [sample(index, architecture.vocab_size) for index in range(len(LENGTHS))]
    batches = [microbatch([samples[i] for i in members], "student", 0, (0.0,) * 2) for members in MICROBATCHES]
    own = batches[dist.get_rank() :: here.world_size]
    student_pass(ddp, own, lambda _, rows: RowLoss(0.0 * rows.sum(), None), sum(map(sum, LENGTHS)))
    found = dict(chunks[0].named_parameters())
    for name, gradient in expected_gradients(folder, samples).items():
        assert gradient.norm() > 1e-3
        error = float((found[name].main_grad - gradient).norm() / gradient.norm())
        print(f"{experts} processes: {name}: relative error {error:.1e}", flush=True)
        assert error < 1e-5
    parallel_state.destroy_model_parallel()
    platform.stop()


def main() -> None:
    [folder] = sys.argv[1:]
    for number, count in enumerate(PROCESSES):
        if int(os.environ["RANK"]) < count:
            enter_group(number, count)
            check(folder, count)


if __name__ == "__main__":
    main()
