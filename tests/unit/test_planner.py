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
from megatron_copsd.architecture import Architecture, Rope
from megatron_copsd.config.load import load_config
from megatron_copsd.errors import UserError
from megatron_copsd.hf.read import FAMILIES
from megatron_copsd.loss.divergence import DivergenceSpec, fused_linear_divergence
from megatron_copsd.plan.hardware import GPUS, Assumptions, peak_flops
from megatron_copsd.plan.memory import activation_bytes, in_flight, loss_scratch, memory_plan, static_bytes, verdict
from megatron_copsd.plan.parameters import Adapters, StagePart, adapter_parameters, stage_parameters
from megatron_copsd.plan.published import known_architecture
from megatron_copsd.plan.search import SearchSpace, layouts, search
from megatron_copsd.plan.steptime import head_flops, linear_flops_per_token, step_flops, step_time
from megatron_copsd.plan.workload import Lengths, MicrobatchShape, PlanLayout, Workload, layout_problems, unplanned
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
    model = known_architecture(name)
    assert model.parameters == parameters
    whole = StagePart(model.layers, True, True, pipeline=1, tensor=1)
    padding = (model.padded_vocab(1) - model.vocab_size) * model.hidden * (1 if model.tied else 2)
    assert sum(p.elements for p in stage_parameters(model, whole)) == parameters + padding


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_of_a_folder(tmp_path: Path, family: str) -> None:
    folder = make_model(tmp_path / family, family, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert known_architecture(str(folder)).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_models_that_are_not_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path: 'no/model'.*Qwen/Qwen3-8B"):
        known_architecture("no/model")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json: model_type: 'gpt2': this family has no weight table"):
        known_architecture(str(tmp_path))


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
    model = Architecture(
        "qwen3", 2, hidden, 64, 4, 2, 16, vocab, 99, 1e-6, Rope(1e4), tied=True, qkv_bias=False, qk_norm=True
    )
    padded = model.padded_vocab(1)
    states = torch.randn(rows, hidden).to(getattr(torch, dtype)).requires_grad_()
    weight = torch.randn(padded, hidden).to(states.dtype).requires_grad_()
    shard = VocabShard(0, padded, vocab)
    with Buffers() as made:
        fused_linear_divergence(
            states, states.detach(), weight, DivergenceSpec(), torch.ones(rows), shard, scratch_bytes=budget
        )
    work = workload(dtype=dtype, device="cpu", implementation="torch", scratch_bytes=budget)
    assert loss_scratch(model, PlanLayout(1), work, rows).bytes == made.bytes > 0


def test_operations_are_those_that_torch_counts(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", tie_word_embeddings=False)
    sizes = known_architecture(str(folder))
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
        (PlanLayout(8, tensor=3), "parallel.tensor: must divide the model's 32 attention heads"),
        (PlanLayout(8, pipeline=5), "number of GPUs (--gpus): must be a multiple of"),
        (PlanLayout(10, pipeline=5), "parallel.pipeline: must divide the model's 36 layers"),
        (PlanLayout(8, sequence=True), "parallel.sequence: cuts the sequence over tensor-parallel ranks"),
        (PlanLayout(8, virtual=2), "parallel.virtual_pipeline: cuts up a pipeline"),
        (PlanLayout(8, recompute_layers=1), "parallel.recompute_layers: has no effect"),
        (PlanLayout(8, expert=2), "parallel.expert: the model has no experts"),
    ],
)
def test_layouts_that_cannot_be(layout: PlanLayout, reason: str) -> None:
    problems = layout_problems(known_architecture("Qwen/Qwen3-8B"), layout)
    assert any(f"{setting}: {rule}".startswith(reason) for setting, _, rule, _ in problems)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("optimizer.packing=true", "optimizer.packing: True: the plan is for padded microbatches"),
        (
            "optimizer.micro_batch_tokens=9999",
            "optimizer.micro_batch_tokens: 9999: the plan is for microbatches of so many sequences; of the longest "
            "these hold 3. Plan with optimizer.micro_batch_tokens=null optimizer.micro_batch_size=3.",
        ),
        ("optimizer.teacher_micro_batch_size=2", "optimizer.teacher_micro_batch_size: 2: the plan is for"),
        ("optimizer.teacher_micro_batch_tokens=2", "optimizer.teacher_micro_batch_tokens: 2: the plan is for"),
        ("parallel.overlap_grad_reduce=true", "parallel.overlap_grad_reduce: True: the plan leaves out"),
        ("loss.implementation=streaming", "loss.implementation: 'streaming': the plan is for"),
    ],
)
def test_what_the_plan_does_not_know_is_refused(capsys: pytest.CaptureFixture[str], override: str, reason: str) -> None:
    config = str(ROOT / "configs" / "qwen3_8b.yaml")
    assert main(["plan", config, "--gpus", "8", override]) == 2
    assert f"command line ({override}): {reason}" in capsys.readouterr().err
    changed = override.partition("=")[0].partition(".")[2]
    assert [setting.rpartition(".")[2] for setting, *_ in unplanned(load_config(config, [override]).config)] == [
        changed
    ]


def test_some_layers_run_again() -> None:
    model, work, shape = known_architecture("Qwen/Qwen3-8B"), workload(), MicrobatchShape(1, 2560, 2048)

    def layout(again: int | None, recompute: str = "full") -> PlanLayout:
        return PlanLayout(8, pipeline=2, virtual=3, recompute=recompute, recompute_layers=again)

    stored = [activation_bytes(model, layout(n), work, shape, 0, 12) for n in (1, 2, 5, 6)]
    whole, none = (activation_bytes(model, layout(None, way), work, shape, 0, 12) for way in ("full", "none"))
    assert none > stored[0] > stored[1] > stored[2] > stored[3] == whole
    # Each layer more, of three chunks on the stage, saves the same.
    assert stored[0] - stored[1] == pytest.approx((none - whole) / 6, rel=1e-6)
    time = [step_time(model, layout(n), work, H100, Assumptions()) for n in (1, 3, 6)]
    full = step_time(model, layout(None), work, H100, Assumptions())
    assert time[0].seconds["student"] < time[1].seconds["student"] < time[2].seconds["student"]
    assert (time[2].seconds, time[2].hfu) == (full.seconds, full.hfu)
    assert time[0].hfu * sum(time[0].seconds.values()) < time[1].hfu * sum(time[1].seconds.values())


def test_what_saves_memory_saves_memory() -> None:
    sizes, work = known_architecture("Qwen/Qwen3-14B"), workload()

    def peak(**changes: object) -> int:
        return memory_plan(sizes, PlanLayout(16, **changes), work, H100, Assumptions()).peak

    assert peak(tensor=2) < peak()
    assert peak(tensor=2, sequence=True, micro_batch=4) < peak(tensor=2, micro_batch=4)
    assert peak(context=2, micro_batch=4) < peak(micro_batch=4)
    assert peak(recompute="full", micro_batch=4) < peak(recompute="selective", micro_batch=4) < peak(micro_batch=4)
    assert peak(distributed_optimizer=True) < peak(distributed_optimizer=False)


def test_experts_are_spread() -> None:
    sizes = known_architecture("Qwen/Qwen3-30B-A3B")
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
    sizes = known_architecture("Qwen/Qwen3-8B")
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
    memory = memory_plan(known_architecture("Qwen/Qwen3-32B"), PlanLayout(8), workload(), H100, Assumptions())
    assert not memory.fits
    lines = verdict(memory)
    assert "does not fit: the" in lines[0]
    assert "gradients, fp32: 12" in lines[1]
    assert "parallel.tensor" in lines[1]


def test_search_is_sorted_and_within_memory() -> None:
    sizes, work = known_architecture("Qwen/Qwen3-8B"), workload()
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
    assert (
        search(known_architecture("Qwen/Qwen3-32B"), 2, work, H100, Assumptions(), SearchSpace()).smallest is not None
    )


def test_time_answers_to_what_it_should() -> None:
    sizes = known_architecture("Qwen/Qwen3-8B")

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
    said = capsys.readouterr().err
    assert "command line (parallel.tensor=3): parallel.tensor: 3: must divide the model's 32 attention heads" in said
    assert f"{config}: number of GPUs (--gpus): 8: must be a multiple" in said


def test_needs_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'megatron', 'huggingface_hub'}"
    code = f"import sys, copsd_tools.plan; assert not {heavy} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
