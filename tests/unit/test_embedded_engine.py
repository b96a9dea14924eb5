"""The embedded engine against transformers' own generate and forward pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import make_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_copsd.errors import UserError
from megatron_copsd.hf.folder import TensorReader, read_hf_config
from megatron_copsd.rollout.embedded import EmbeddedEngine
from megatron_copsd.rollout.engine import Request, Sampling
from megatron_copsd.sync.buckets import in_buckets

PROMPTS = [(5, 9, 20, 31), (7, 8), (100, 90, 80, 70, 60, 50)]
SAMPLING = Sampling(temperature=0.7, top_p=1.0, top_k=0, max_tokens=10, stop_ids=(1,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("engine") / "model")


@pytest.fixture(scope="module")
def engine(folder: Path) -> EmbeddedEngine:
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    made = EmbeddedEngine(config, tokenizer, torch.float32, torch.device("cpu"), batch_size=2)
    reader = TensorReader(folder)
    # Buckets of 4 kB, so that there are many.
    made.update_weights(lambda: in_buckets(((n, reader.get(n)) for n in sorted(reader.names())), 4096), 7)
    return made


def test_greedy_is_transformers_greedy(folder: Path, engine: EmbeddedEngine) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    greedy = Sampling(0.0, 1.0, 0, 10, (1,))
    for prompt, rollout in zip(PROMPTS, engine.generate([Request(p, 0) for p in PROMPTS], greedy), strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, do_sample=False, max_new_tokens=10, eos_token_id=1, pad_token_id=1)[0, len(prompt) :]
        expected = out.tolist()
        expected = expected[: expected.index(1) + 1] if 1 in expected else expected
        assert list(rollout.response) == expected
        assert rollout.finish_reason == ("stop" if expected[-1] == 1 else "length")
        assert rollout.weight_version == 7


def test_log_probs_are_those_of_the_sampling_temperature(folder: Path, engine: EmbeddedEngine) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    narrow = Sampling(0.7, 0.8, 5, 10, (1,))
    for prompt, rollout in zip(PROMPTS, engine.generate([Request(p, 3) for p in PROMPTS], narrow), strict=True):
        ids = torch.tensor([[*prompt, *rollout.response]])
        with torch.no_grad():
            log_probs = (model(ids).logits[0] / 0.7).log_softmax(-1)
        for n, token in enumerate(rollout.response):
            assert rollout.token_log_probs[n] == pytest.approx(float(log_probs[len(prompt) - 1 + n, token]), abs=1e-4)


def test_a_response_does_not_depend_on_its_neighbours(engine: EmbeddedEngine) -> None:
    together = engine.generate([Request(p, seed) for seed, p in enumerate(PROMPTS)], SAMPLING)
    alone = [engine.generate([Request(p, seed)], SAMPLING)[0] for seed, p in enumerate(PROMPTS)]
    assert [r.response for r in together] == [r.response for r in alone]
    others = engine.generate([Request(p, seed + 50) for seed, p in enumerate(PROMPTS)], SAMPLING)
    assert [r.response for r in together] != [r.response for r in others]


def test_sampling_follows_the_distribution(folder: Path, engine: EmbeddedEngine) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt, count = PROMPTS[0], 4000
    one = Sampling(1.0, 1.0, 4, 1, (1,))
    engine._batch_size = count
    tokens = torch.tensor([r.response[0] for r in engine.generate([Request(prompt, s) for s in range(count)], one)])
    engine._batch_size = 2
    with torch.no_grad():
        top = model(torch.tensor([prompt])).logits[0, -1].topk(4)
    expected = top.values.softmax(-1)
    shares = torch.stack([(tokens == token).float().mean() for token in top.indices])
    assert shares.sum() == pytest.approx(1.0)  # nothing outside the top 4
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((shares - expected).abs() < 4.5 * deviation).all()


# What a model's files may say of sampling, each so that it would change a response.
LEAKING = {
    "min_new_tokens": 9,
    "min_length": 15,
    "max_length": 3,
    "max_new_tokens": 2,
    "max_time": 1e-9,
    "stop_strings": ["a"],
    "do_sample": True,
    "num_beams": 2,
    "temperature": 9.0,
    "top_k": 1,
    "top_p": 0.01,
    "min_p": 0.9,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.5,
    "repetition_penalty": 50.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(2, 300)),
    "begin_suppress_tokens": [7],
    "bad_words_ids": [[5]],
    "forced_bos_token_id": 4,
    "forced_eos_token_id": 3,
    "exponential_decay_length_penalty": [1, 100.0],
    "sequence_bias": [[[5], 100.0]],
    "guidance_scale": 3.0,
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "prompt_lookup_num_tokens": 3,
    "renormalize_logits": True,
    "cache_implementation": "static",
    "use_cache": False,
    "eos_token_id": [1, *range(20, 300)],
    "pad_token_id": 3,
    "attn_implementation": "flash_attention_2",
}


def spoilt(folder: Path, out: Path, name: str) -> EmbeddedEngine:
    """An engine of the same model, in whose file ``name`` every default is set."""
    shutil.copytree(folder, out)
    content = json.loads((out / name).read_text(encoding="utf-8"))
    (out / name).write_text(json.dumps({**content, **LEAKING}), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = EmbeddedEngine(read_hf_config(str(out)), tokenizer, torch.float32, torch.device("cpu"), batch_size=2)
    reader = TensorReader(out)
    made.update_weights(lambda: in_buckets(((n, reader.get(n)) for n in sorted(reader.names())), 4096), 7)
    return made


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_the_models_own_defaults_do_not_reach_sampling(
    folder: Path, engine: EmbeddedEngine, tmp_path: Path, name: str
) -> None:
    requests = [Request(p, seed) for seed in range(4) for p in PROMPTS]
    for sampling in (SAMPLING, Sampling(0.0, 1.0, 0, 10, (1,)), Sampling(1.3, 0.9, 40, 10, (1, 9))):
        expected = engine.generate(requests, sampling)
        assert spoilt(folder, tmp_path / f"{sampling.temperature}", name).generate(requests, sampling) == expected


def test_too_long_for_the_model(engine: EmbeddedEngine) -> None:
    with pytest.raises(UserError, match=r"rollout\.max_response_tokens: 2046.*2048 positions"):
        engine.generate([Request(PROMPTS[0], 0)], Sampling(1.0, 1.0, 0, 2046, (1,)))
