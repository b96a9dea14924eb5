"""The planner's arithmetic, without processes: sizes, buffers of the loss, operations, search, and its command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import ROOT, environment
from tiny import make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from copsd_tools.cli import main
from megatron_copsd.errors import UserError
from megatron_copsd.hf.architecture import read_architecture
from megatron_copsd.loss.divergence import DivergenceSpec, fused_linear_divergence
from megatron_copsd.plan.explain import verdict
from megatron_copsd.plan.flops import head_flops, linear_flops_per_token, step_flops
from megatron_copsd.plan.hardware import GPUS, Assumptions, peak_flops
from megatron_copsd.plan.layout import PlanLayout, layout_problems
from megatron_copsd.plan.memory import in_flight, loss_scratch, memory_plan, static_bytes
from megatron_copsd.plan.search import SearchSpace, layouts, search
from megatron_copsd.plan.sizes import PUBLISHED, Adapters, ModelSizes, StagePart, adapter_parameters, read_sizes
from megatron_copsd.plan.steptime import step_time
from megatron_copsd.plan.workload import Lengths, Workload
from megatron_copsd.types import VocabShard

H100 = GPUS["h100-80"]
LENGTHS = Lengths(512, 4096, 2048)


def workload(**changes: object) -> Workload:
    usual = {
        "sequences": 32,
        "longest": LENGTHS,
        "typical": LENGTHS,
        "dtype": "bfloat16",
        "implementation": "transformer_engine",
        "device": "cuda",
        "teacher": "frozen",
        "loss_recompute": False,
        "scratch_bytes": None,
        "bucket_bytes": 1 << 28,
        "engine": "sglang",
        "engine_tensor": 1,
        "engines": 8,
        "shares_gpus": False,
        "concurrency": 64,
    }
    return Workload(**{**usual, **changes})


# Parameter counts that the models were published with.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("Qwen/Qwen3-4B", 4_022_468_096),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen3-14B", 14_768_307_200),
        ("Qwen/Qwen3-32B", 32_762_123_264),
        ("Qwen/Qwen3-30B-A3B", 30_532_122_624),
        ("Qwen/Qwen3-235B-A22B", 235_093_634_560),
    ],
)
def test_published_sizes(name: str, parameters: int) -> None:
    assert PUBLISHED[name].parameters == parameters


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_sizes_of_a_folder(tmp_path: Path, family: str) -> None:
    folder = make_model(tmp_path / family, family, tie_word_embeddings=False)
    sizes = read_sizes(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    architecture, _ = read_architecture(str(folder))
    assert sizes.padded_vocab(2) == architecture.padded_vocab(2)


def test_sizes_that_are_not_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path: 'no/model'.*Qwen/Qwen3-8B"):
        read_sizes("no/model")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "num_attention_heads": 2}', encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json.*hidden_size.*missing"):
        read_sizes(str(tmp_path))


class Buffers(TorchDispatchMode):
    """Bytes of uninitialised tensors made: only the loss's buffers are."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format:
            self.bytes += out.nbytes
        return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "hidden", "vocab", "budget"), [(64, 32, 5000, None), (700, 64, 3000, 4 << 20)])
def test_loss_scratch_is_exact(dtype: str, rows: int, hidden: int, vocab: int, budget: int | None) -> None:
    sizes = ModelSizes(2, hidden, 64, 4, 2, 16, vocab, tied=True)
    padded = sizes.padded_vocab(1)
    states = torch.randn(rows, hidden).to(getattr(torch, dtype)).requires_grad_()
    weight = torch.randn(padded, hidden).to(states.dtype).requires_grad_()
    shard = VocabShard(0, padded, vocab)
    with Buffers() as made:
        fused_linear_divergence(
            states, states.detach(), weight, DivergenceSpec(), torch.ones(rows), shard, scratch_bytes=budget
        )
    work = workload(dtype=dtype, device="cpu", implementation="torch", scratch_bytes=budget)
    assert loss_scratch(sizes, PlanLayout(1), work, rows).bytes == made.bytes > 0


def test_operations_are_those_that_torch_counts(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", tie_word_embeddings=False)
    sizes = read_sizes(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    length = 40
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.int64)).logits.sum().backward()
    # Eager attention multiplies the half that the mask hides too, and the first layer's input needs no gradient.
    attention = 2 * 2 * 2.0 * sizes.layers * sizes.query_width * length * length / 2
    linear = sizes.layers * length * linear_flops_per_token(sizes)
    expected = 3 * (linear + attention + head_flops(sizes, length))
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)
    counted = step_flops(sizes, [length], [], length)
    assert counted.model == pytest.approx(expected - 3 * attention / 2, rel=1e-9)


def test_in_flight_microbatches() -> None:
    layout = PlanLayout(8, pipeline=4)
    assert [in_flight(layout, stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(layout, 0, 2) == 2
    # Interleaved, arXiv 2104.04473: the first of 4 stages with 2 chunks each holds 11 chunks.
    assert in_flight(PlanLayout(8, pipeline=4, virtual=2), 0, 16) == 5.5


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (PlanLayout(8, tensor=3), "TP 3 does not divide 32 heads"),
        (PlanLayout(8, pipeline=5), "does not divide 8 GPUs"),
        (PlanLayout(10, pipeline=5), "PP 5 does not cut 36 layers"),
        (PlanLayout(8, sequence=True), "sequence parallelism needs TP"),
        (PlanLayout(8, expert=2), "no experts"),
    ],
)
def test_layouts_that_cannot_be(layout: PlanLayout, reason: str) -> None:
    assert any(reason in problem for problem in layout_problems(PUBLISHED["Qwen/Qwen3-8B"], layout))


def test_what_saves_memory_saves_memory() -> None:
    sizes, work = PUBLISHED["Qwen/Qwen3-14B"], workload()

    def peak(**changes: object) -> int:
        return memory_plan(sizes, PlanLayout(16, **changes), work, H100, Assumptions()).peak

    assert peak(tensor=2) < peak()
    assert peak(tensor=2, sequence=True, micro_batch=4) < peak(tensor=2, micro_batch=4)
    assert peak(context=2, micro_batch=4) < peak(micro_batch=4)
    assert peak(recompute="full", micro_batch=4) < peak(recompute="selective", micro_batch=4) < peak(micro_batch=4)
    assert peak(distributed_optimizer=True) < peak(distributed_optimizer=False)


def test_experts_are_spread() -> None:
    sizes = PUBLISHED["Qwen/Qwen3-30B-A3B"]
    together, spread = (static_bytes(sizes, PlanLayout(16, expert=ranks), workload(), 0) for ranks in (1, 8))
    experts = 48 * 128 * 3 * 2048 * 768
    assert together.local - spread.local == 2 * experts * 7 // 8
    # Each expert then has two replicas, which share its optimizer state; the rest has sixteen.
    rest = sizes.parameters - experts
    assert spread.optimizer == pytest.approx(12 * (experts // 8 / 2 + rest / 16), rel=0.01)
    for implementation in ("torch", "transformer_engine"):
        work = workload(implementation=implementation)
        assert memory_plan(sizes, PlanLayout(16, expert=8), work, H100, Assumptions()).peak > spread.weights


def test_adapters_are_all_that_is_trained() -> None:
    sizes = PUBLISHED["Qwen/Qwen3-8B"]
    work, layout = workload(adapters=Adapters(64)), PlanLayout(8, tensor=2)
    held, whole = (static_bytes(sizes, layout, each, 0) for each in (work, workload()))
    one = StagePart(sizes.layers, True, True, pipeline=1, tensor=1)
    # As PEFT counts rank 64 on all seven projections of Qwen3-8B.
    assert sum(p.elements for p in adapter_parameters(sizes, one, Adapters(64))) == 174_587_904
    assert held.local == whole.local
    assert held.gradients < whole.gradients / 20
    plan = memory_plan(sizes, layout, work, H100, Assumptions())
    assert plan.host == 0
    assert not {"student's weights, aside", "teacher's output weight"} & {part.name for part in plan.parts}
    low, full = (step_time(sizes, layout, each, H100, Assumptions()) for each in (work, workload()))
    assert low.seconds["student"] < full.seconds["student"]


def test_a_layout_that_does_not_fit_is_explained() -> None:
    memory = memory_plan(PUBLISHED["Qwen/Qwen3-32B"], PlanLayout(8), workload(), H100, Assumptions())
    assert not memory.fits
    lines = verdict(memory)
    assert "does not fit: the" in lines[0]
    assert "gradients, fp32: 12" in lines[1]
    assert "parallel.tensor" in lines[1]


def test_search_is_sorted_and_within_memory() -> None:
    sizes, work = PUBLISHED["Qwen/Qwen3-8B"], workload()
    result = search(sizes, 8, work, H100, Assumptions(), SearchSpace())
    times = [round(plan.time.total, 3) for plan in result.ranked]  # what is nearer counts as equal
    assert times == sorted(times)
    assert all(plan.memory.fits for plan in result.ranked)
    assert sum(result.rejected.values()) > 0
    plain = SearchSpace(sequence=(False,), virtual=(1,), context=(1,), recompute=("none",))
    assert times[0] <= search(sizes, 8, work, H100, Assumptions(), plain).ranked[0].time.total
    interleaved = [plan for plan in layouts(sizes, 8, work, SearchSpace()) if plan.virtual > 1]
    assert interleaved
    assert all(work.microbatches(plan.data, plan.micro_batch) % plan.pipeline == 0 for plan in interleaved)
    assert search(PUBLISHED["Qwen/Qwen3-32B"], 2, work, H100, Assumptions(), SearchSpace()).smallest is not None


def test_time_answers_to_what_it_should() -> None:
    sizes = PUBLISHED["Qwen/Qwen3-8B"]

    def time(layout: PlanLayout, **changes: object):
        return step_time(sizes, layout, workload(**changes), H100, Assumptions())

    few, many = (time(PlanLayout(8, tensor=2), sequences=n) for n in (32, 64))
    assert many.seconds["student"] == pytest.approx(2 * few.seconds["student"], rel=0.01)
    assert time(PlanLayout(8, pipeline=4)).bubble > time(PlanLayout(8, pipeline=2)).bubble
    assert 0.2 < few.mfu <= few.hfu < Assumptions().gemm
    recomputed = time(PlanLayout(8, tensor=2, recompute="full"))
    assert recomputed.hfu - recomputed.mfu > few.hfu - few.mfu
    assert time(PlanLayout(8, tensor=2), teacher=None).seconds["teacher"] == 0


def test_peak_of_unknown_devices_is_not_invented() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA GeForce RTX 3060") is None


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "qwen3_8b.yaml")
    assert main(["plan", config, "--gpus", "8", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    parts = [part for part in plan["memory"]["parts"] if plan["memory"]["phase"] in part["phases"]]
    assert sum(part["bytes"] for part in parts) == plan["memory"]["peak"] <= plan["memory"]["capacity"]
    assert main(["plan", config, "--gpus", "8"]) == 0
    assert "fits:" in capsys.readouterr().out
    one = [f"parallel.{axis}=1" for axis in ("pipeline", "virtual_pipeline", "context")]
    assert main(["plan", config, "--gpus", "1", *one]) == 1
    assert "does not fit" in capsys.readouterr().out
    assert main(["plan", config, "--gpus", "8", "--search"]) == 0
    assert "layouts fit" in capsys.readouterr().out
    assert main(["plan", config, "--gpus", "8", "parallel.tensor=3"]) == 2
    assert "TP 3 does not divide" in capsys.readouterr().err


def test_needs_no_torch() -> None:
    code = "import sys, copsd_tools.plan; assert not {'torch', 'transformers', 'megatron'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
