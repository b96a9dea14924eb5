"""``copsd bench kernels --explain``: its arithmetic is what the losses do."""

from dataclasses import replace

import pytest
from allocations import WatchAllocations
from products import count_flops

from copsd_tools.bench import command as bench
from copsd_tools.bench.kernels.cases import Case, make_inputs
from copsd_tools.bench.kernels.explain.costs import (
    chunked_traffic_bytes,
    cost,
    find_device,
    fused_gradient_bytes,
    fused_scratch,
    input_bytes,
)
from copsd_tools.bench.kernels.measuring.floor import GemmFloor
from copsd_tools.bench.kernels.measuring.worker import finish
from copsd_tools.bench.kernels.subjects.implementation import FusedOptions, fused_extra_units
from copsd_tools.bench.kernels.subjects.registry import SUBJECTS
from megatron_copsd.errors import UserError
from megatron_copsd.loss.divergence import DivergenceSpec

CASE = Case(rows=96, hidden=16, vocab=2048, scratch_mb=0.5)
RUNS_HERE = ("fused", "fused_torch", "dense", "checkpointed")
ONCE = [(what, frozen) for what in SUBJECTS for frozen in (False, True)]


def run(case: Case, name: str) -> None:
    implementation = SUBJECTS[case.what].implementations[name]
    inputs = make_inputs(case)
    finish(case, inputs, lambda: implementation.run(case, inputs, implementation.chunks[0]))


@pytest.mark.parametrize(("what", "frozen"), ONCE)
@pytest.mark.parametrize("name", [*RUNS_HERE, "fused_recompute"])
def test_units_are_the_products_that_are_run(what, frozen, name):
    case = replace(CASE, what=what, frozen_weight=frozen, rows=512)
    implementation = SUBJECTS[what].implementations.get(name)
    if implementation is None:
        assert (what, name) in {("log_probs", "checkpointed"), ("log_probs", "fused_recompute")}
        return
    unit = 2 * case.rows * case.hidden * case.vocab
    assert count_flops(lambda: run(case, name)) == cost(case, implementation).units * unit


@pytest.mark.parametrize(
    ("what", "frozen", "products"),
    [("divergence", True, 3), ("cross_entropy", False, 3), ("cross_entropy", True, 2), ("log_probs", False, 1)],
)
def test_floor_is_of_what_is_computed(what, frozen, products):
    case = replace(CASE, what=what, frozen_weight=frozen)
    assert SUBJECTS[what].floor_units(case) == products
    assert count_flops(GemmFloor(case, make_inputs(case)).run) == products * 2 * CASE.rows * CASE.hidden * CASE.vocab


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", SUBJECTS)
def test_scratch_and_gradients_are_what_the_loss_allocates(what, dtype):
    case = replace(CASE, what=what, dtype=dtype)
    inputs = make_inputs(case)
    implementation = SUBJECTS[what].implementations["fused"]
    with WatchAllocations() as watched:
        finish(case, inputs, lambda: implementation.run(case, inputs, None))
    found = cost(case, implementation)
    assert found.gradient_bytes == fused_gradient_bytes(case)
    assert found.scratch_bytes <= case.scratch_mb * 2**20
    rest = watched.peak_bytes - found.scratch_bytes - found.gradient_bytes
    assert rest <= case.rows * 8 * 24  # a few numbers of each row
    # In bfloat16 the buffers are gone before the gradients are rounded: the two parts are no peak together.
    assert rest >= 0 or dtype == "bfloat16"


@pytest.mark.parametrize(
    ("what", "kind", "recompute", "bytes_each"),
    [
        ("divergence", "forward_kl", False, 8 + 8 + 8 + 2),
        ("divergence", "jsd", False, 8 + 8 + 16 + 2),
        ("divergence", "forward_kl", True, (8 + 8 + 8) + (8 + 8 + 8 + 2)),
        ("cross_entropy", "forward_kl", False, 4 + 4 + 4 + 2),
        ("log_probs", "forward_kl", False, 4 + 4),
    ],
)
def test_traffic_is_what_the_kernels_read_and_write(what, kind, recompute, bytes_each):
    """Bytes of each pair of row and vocabulary entry, in bfloat16 on CUDA: logits written, read, gradients written."""
    spec = DivergenceSpec(kind)
    case = Case(8192, 4096, 151936, what, "bfloat16", spec, frozen_weight=True, device="cuda")
    options = FusedOptions(recompute=recompute)
    assert chunked_traffic_bytes(case, options, fused_scratch(case, options)) == bytes_each * case.rows * case.vocab


def test_bytes_of_inputs():
    for what in SUBJECTS:
        case = replace(CASE, what=what, dtype="bfloat16")
        inputs = make_inputs(case)
        used = [inputs.student_hidden, inputs.weight, inputs.row_weights]
        used.append(inputs.teacher_hidden if what == "divergence" else inputs.labels)
        assert input_bytes(case) == sum(tensor.nbytes for tensor in used)


@pytest.mark.parametrize(
    ("what", "spec", "units"),
    [
        ("divergence", DivergenceSpec("forward_kl"), 6),
        ("divergence", DivergenceSpec("forward_kl", token_clip=0.1), 8),
        ("divergence", DivergenceSpec("jsd"), 8),
        ("cross_entropy", DivergenceSpec(), 4),
        ("log_probs", DivergenceSpec(), 1),
    ],
)
def test_units_of_a_streaming_loss(what, spec, units):
    """It makes the logits again for each pass, and all but the weight's gradient whether that is frozen or not."""
    case = replace(CASE, what=what, spec=spec)
    assert streaming_units(case) == units
    assert streaming_units(replace(case, frozen_weight=True)) == units - SUBJECTS[what].differentiated


def streaming_units(case: Case) -> int:
    subject = SUBJECTS[case.what]
    case, options = replace(case, device="cuda"), FusedOptions("streaming")
    extra = fused_extra_units(options, subject.views if subject.differentiated else 0, case)
    return subject.floor_units(case) + extra


def test_command_prints_without_running(tmp_path, monkeypatch, capsys):
    """For a GPU that is not here, of a shape that this machine could not hold."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    arguments = ["--shapes", "8192,4096,151936", "--kinds", "forward_kl", "--entry-clips", "none"]
    assert bench.main(["kernels", "--explain", "H200", *arguments, "--scratch-mb", "1280"]) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in printed.splitlines() if line.strip()}
    assert lines["gemm_floor"][1:3] == ["4", "41.24"]  # 4 * 2 R H V operations at 989 TFLOP/s
    assert lines["fused_recompute"][1] == "6"
    assert lines["dense"][-2:] == ["≥", "9496"]
    assert 0 < float(lines["fused"][6]) <= 1280
    assert "A unit is 2 R H V = 10.2 TFLOP" in printed
    assert not list(tmp_path.iterdir())


def test_command_explains_this_machine(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    shape = ["--shapes", "64,32,512", "--device", "cpu", "--threads", "1"]
    for what in SUBJECTS:
        assert bench.main(["kernels", "--explain", "--what", what, *shape, "--tflops", "0.1", "--gbytes", "5"]) == 0
        assert "0.1 TFLOP/s, 5 GB/s" in capsys.readouterr().out
    with pytest.raises(UserError, match="scratch_mb"):
        bench.main(["kernels", "--explain", *shape, "--tflops", "0.1", "--gbytes", "5", "--scratch-mb", "0.0001"])


def test_speeds_that_are_not_known_are_measured():
    case = replace(CASE, tensor_parallel=2)
    device = find_device("some processor", case, None, None)
    assert 1e-4 < device.tflops["float32"] < 100
    assert 0.1 < device.gbytes < 10000
    assert find_device("NVIDIA H100 80GB HBM3", case, None, 1000).tflops["bfloat16"] == 989
    assert find_device("NVIDIA H100 80GB HBM3", case, None, 1000).gbytes == 1000
