"""``copsd bench kernels``: what it compares agrees with the oracle, and what it writes is complete."""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from copsd_kernels import reference
from copsd_tools.bench import command as bench
from copsd_tools.bench.kernels.cases import Case, Inputs, make_inputs
from copsd_tools.bench.kernels.catalogue import CATALOGUE, FLOOR
from copsd_tools.bench.kernels.measuring import floor as floor_module
from copsd_tools.bench.kernels.measuring.floor import GemmFloor
from copsd_tools.bench.kernels.measuring.measure import measure
from copsd_tools.bench.kernels.measuring.processes import Failure, run_ranks
from copsd_tools.bench.kernels.measuring.worker import Plan
from copsd_tools.bench.kernels.results.file import read
from copsd_tools.bench.kernels.subjects.divergence import divergence
from copsd_tools.bench.kernels.subjects.registry import SUBJECTS
from megatron_copsd.errors import UserError
from megatron_copsd.loss.divergence import DivergenceSpec

CASE = Case(rows=12, hidden=16, vocab=101)
SPECS = {
    "forward_kl": DivergenceSpec("forward_kl"),
    "reverse_kl": DivergenceSpec("reverse_kl", temperature=0.7),
    "jsd": DivergenceSpec("jsd", jsd_weight=0.3),  # 0.5 would not tell teacher from student
    "entry clip": DivergenceSpec("forward_kl", entry_clip=0.01),
    "both clips": DivergenceSpec("jsd", jsd_weight=0.3, entry_clip=0.01, token_clip=0.05),
}
IMPLEMENTATIONS = SUBJECTS["divergence"].implementations
LIGER = {"liger_fused", "liger_chunked", "liger_chunked_best", "liger_chunked_eager"}
SIBLINGS = ("cross_entropy", "log_probs")
TINY = ["kernels", "--shapes", "16,8,64", "--device", "cpu", "--threads", "1", "--repeats", "2", "--warmup", "0"]


def test_the_catalogue_names_what_there_is():
    """In the same order: tables follow the one, the help the other."""
    assert {what: list(subject.implementations) for what, subject in SUBJECTS.items()} == {
        what: list(offer.implementations) for what, offer in CATALOGUE.items()
    }


def runnable(what: str, compiles: bool) -> list[str]:
    """Implementations that a CPU can run."""
    case, found = replace(CASE, what=what), SUBJECTS[what].implementations.items()
    return [name for name, entry in found if entry.compiles == compiles and entry.refuses(case) is None]


def exact(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """Loss and gradients, or row values, of the oracle in float64."""
    student, weight = (t.detach().double().requires_grad_() for t in (inputs.student_hidden, inputs.weight))
    teacher_logits = inputs.teacher_hidden.double() @ weight.detach().t()
    log_probs = reference.token_log_prob(student @ weight.t(), inputs.labels, temperature=case.spec.temperature)
    if case.what == "log_probs":
        return log_probs.detach(), reference.entropy(student @ weight.t(), temperature=case.spec.temperature).detach()
    loss = -log_probs.mean()
    if case.what == "divergence":
        loss = divergence(case.spec, student @ weight.t(), teacher_logits).mean()
    return loss.detach(), *torch.autograd.grad(loss, (student, weight))


def assert_agrees(case: Case, name: str, chunk: int | None) -> None:
    inputs = make_inputs(case)
    found = SUBJECTS[case.what].implementations[name].run(case, inputs, chunk)
    if SUBJECTS[case.what].differentiated:
        found = (found.detach(), *torch.autograd.grad(found, inputs.leaves))
    for a, b in zip(found, exact(case, inputs), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", runnable("divergence", compiles=False))
def test_every_implementation_computes_the_same(name, spec):
    case = replace(CASE, spec=spec)
    refusal = IMPLEMENTATIONS[name].refuses(case)
    if refusal is not None:
        assert name in LIGER
        assert refusal == "does not offer entry_clip"
        return
    chunked = IMPLEMENTATIONS[name].chunks != (None,)
    for chunk in (4, 5, 100) if chunked else (None,):
        assert_agrees(case, name, chunk)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("what", "name"), [(what, name) for what in SIBLINGS for name in runnable(what, compiles=False)]
)
def test_every_implementation_of_the_siblings_computes_the_same(what, name, temperature):
    case = replace(CASE, what=what, spec=DivergenceSpec(temperature=temperature))
    implementation = SUBJECTS[what].implementations[name]
    refusal = implementation.refuses(case)
    if refusal is not None:
        assert (name, temperature, refusal) == ("torch_chunked", 0.7, "does not offer temperature")
        return
    for chunk in (4, 5, 100) if implementation.chunks != (None,) else (None,):
        assert_agrees(case, name, chunk)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "name"), [(what, name) for what in SIBLINGS for name in runnable(what, compiles=True)]
)
def test_what_compiles_of_the_siblings_computes_the_same(what, name):
    assert_agrees(replace(CASE, what=what), name, None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("name", ["dense_compiled", "liger_chunked"])
def test_what_compiles_computes_the_same(name, kind):
    assert_agrees(replace(CASE, spec=SPECS[kind]), name, 6 if name in LIGER else None)


def test_liger_fused_computes_the_same_in_the_interpreter():
    """Its kernels need a GPU, or Triton's interpreter, which must be chosen before anything is imported."""
    code = (
        "from dataclasses import replace\n"
        "from test_bench import CASE, SPECS, assert_agrees\n"
        "for kind in ('forward_kl', 'reverse_kl', 'jsd'):\n"
        "    assert_agrees(replace(CASE, spec=SPECS[kind]), 'liger_fused', None)\n"
        "assert_agrees(replace(CASE, what='cross_entropy'), 'liger_fused', None)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("what", "name"), [(what, name) for what in SUBJECTS for name in SUBJECTS[what].implementations]
)
def test_every_implementation_is_measured_on_cuda(what, name):
    case = replace(CASE, what=what, rows=512, hidden=64, vocab=1024, dtype="bfloat16", device="cuda")
    floor, found = measure(case, (FLOOR, name), Plan(warmup=1, repeats=2, check_rows=64))
    assert floor.note == {"divergence": "4 products", "cross_entropy": "3 products", "log_probs": "1 product"}[what]
    assert found.note == ""
    assert found.median_ms > 0
    assert found.extra_mib > 0
    errors = [getattr(found, f"{output}_error") for output in SUBJECTS[what].outputs]
    assert max(errors) < (0.02 if name.startswith("fused") else 1)


@pytest.mark.parametrize("slices", [1, 3])
def test_floor_computes_all_products(slices, monkeypatch):
    """In slices or not: run where the logits' buffer may be as large as one slice."""
    inputs = make_inputs(CASE)
    row_bytes = 2 * CASE.vocab * 4
    monkeypatch.setattr(floor_module, "memory_bytes", lambda device: 16 * row_bytes * CASE.rows // slices)
    floor = GemmFloor(CASE, inputs)
    floor.run()
    student, weight = inputs.student_hidden.detach(), inputs.weight.detach()
    torch.testing.assert_close(floor._weight_gradient, (student @ weight.t()).t() @ student)
    assert floor.note == ("4 products" if slices == 1 else "4 products, in 3 slices of rows")
    assert len(floor._logits) == 2 * CASE.rows // slices


def test_command_writes_everything_and_resumes(tmp_path, capsys):
    command = [*TINY, "--out", str(tmp_path), "--kinds", "jsd", "--entry-clips", "0.05", "none"]
    names = ["fused", "dense", "liger_fused", "liger_chunked_eager"]
    assert bench.main([*command, "--implementations", *names]) == 0
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [(line["implementation"], line["note"]) for line in lines] == [
        (FLOOR, "4 products"),
        ("fused", ""),
        ("dense", ""),
        ("liger_fused", "does not offer entry_clip"),
        ("liger_chunked_eager", "does not offer entry_clip"),
        (FLOOR, "4 products"),
        ("fused", ""),
        ("dense", ""),
        ("liger_fused", "its Triton kernels need a CUDA device"),
        ("liger_chunked_eager", ""),
    ]
    for line in lines:
        numbers = [line[name] for name in ("median_ms", "min_ms", "iqr_ms", "floor_ratio", "dense_ratio")]
        measured = line["implementation"] == FLOOR or line["note"] == ""
        assert all(numbers) if measured else not any(numbers)
        if measured and line["implementation"] != FLOOR:
            assert float(line["peak_mib"]) >= 0
            assert max(float(line["hidden_error"]), float(line["weight_error"])) < 1e-4
            assert 0.05 < float(line["teacher_kl"]) < 0.5
        assert all(line[name] for name in ("commit", "torch", "device_name", "date", "command", "liger_kernel"))
    plots = sorted(tmp_path.glob("*.png"))
    markdown = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert len(plots) == 2
    assert all(f"]({plot.name})" in markdown for plot in plots)
    assert all(text in markdown for text in ("does not offer entry_clip", "copsd bench kernels", lines[0]["commit"]))

    before = (tmp_path / "results.csv").read_bytes()
    assert bench.main([*command, "--implementations", *names]) == 0
    assert (tmp_path / "results.csv").read_bytes() == before
    assert bench.main([*command[:-2], "none", "--implementations", *names, "checkpointed"]) == 0
    results = read(tmp_path / "results.csv")
    assert (tmp_path / "results.csv").read_bytes().startswith(before)
    (added,) = results[len(lines) :]
    assert added.measurement.implementation == "checkpointed"
    assert added.measurement.dense_ratio
    assert added.measurement.floor_ratio


def test_failures_are_lines(tmp_path):
    """A budget that holds no row, found in the process that measures; tried again only when asked to."""
    command = [*TINY, "--out", str(tmp_path), "--implementations", "fused", "--tensor-parallel", "2"]
    assert bench.main([*command, "--scratch-mb", "0.0001"]) == 0
    (floor, fused) = read(tmp_path / "results.csv")
    assert not floor.failed
    assert fused.failed
    assert fused.measurement.note.startswith("UserError: loss.scratch_mb")
    text = (tmp_path / "results.csv").read_text(encoding="utf-8")
    (tmp_path / "results.csv").write_text(text.replace(",0.0001,", ",,"), encoding="utf-8")
    assert bench.main(command) == 0
    assert read(tmp_path / "results.csv")[1].failed
    assert bench.main([*command, "--retry"]) == 0
    floor, fused = read(tmp_path / "results.csv")
    assert not fused.failed
    assert fused.case.tensor_parallel == 2
    assert max(fused.measurement.hidden_error, fused.measurement.weight_error) < 1e-4


@pytest.mark.parametrize(
    ("what", "notes", "outputs"),
    [
        (
            "cross_entropy",
            {"liger_fused": "its Triton kernels need a CUDA device"},
            ("hidden_error", "weight_error"),
        ),
        pytest.param("log_probs", {"dense_chunked": ""}, ("log_prob_error", "entropy_error"), marks=pytest.mark.slow),
    ],
)
def test_siblings_are_measured(what, notes, outputs, tmp_path, capsys):
    """In the folder that holds divergences too; each subject with a table of its own."""
    notes = {"fused": "", "dense": ""} | notes
    assert bench.main([*TINY, "--out", str(tmp_path), "--implementations", "liger_fused"]) == 0
    assert bench.main([*TINY, "--out", str(tmp_path), "--what", what, "--implementations", *notes]) == 0
    _, _, floor, *results = read(tmp_path / "results.csv")
    assert floor.measurement.note == {"cross_entropy": "3 products", "log_probs": "1 product"}[what]
    assert {result.measurement.implementation: result.measurement.note for result in results} == notes
    for result in results:
        assert result.case.what == what
        errors = {name: getattr(result.measurement, name) for name in ERRORS}
        measured = not result.failed
        assert {name for name, error in errors.items() if error is not None} == (set(outputs) if measured else set())
        assert all(0 < error < 1e-4 for error in errors.values() if error is not None)
        assert result.measurement.teacher_kl is None
    markdown = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert f"float32, {what}, cpu" in markdown


ERRORS = ("hidden_error", "weight_error", "log_prob_error", "entropy_error")


def test_siblings_share_the_vocabulary(tmp_path):
    command = [*TINY, "--out", str(tmp_path), "--implementations", "fused", "dense", "--tensor-parallel", "2"]
    assert bench.main([*command, "--what", "cross_entropy"]) == 0
    floor, fused, dense = (result.measurement for result in read(tmp_path / "results.csv"))
    assert floor.median_ms > 0
    assert max(fused.hidden_error, fused.weight_error) < 1e-4
    assert dense.note == "does not offer tensor_parallel"


def end_abruptly(case: Case, rank: int) -> None:
    if rank == 1:
        os._exit(3)
    torch.distributed.barrier()


def test_a_process_that_dies_is_a_failure():
    found = run_ranks(end_abruptly, replace(CASE, tensor_parallel=2))
    assert isinstance(found, Failure)
    assert "exit code 3" in found.reason or "Connection closed" in found.reason


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "results.csv").write_text("implementation,seconds\nfused,1\n", encoding="utf-8")
    with pytest.raises(UserError, match="other columns"):
        bench.main([*TINY, "--out", str(tmp_path)])
    (tmp_path / "results.csv").unlink()
    assert bench.main([*TINY, "--out", str(tmp_path), "--implementations", "liger_fused"]) == 0
    text = (tmp_path / "results.csv").read_text(encoding="utf-8")
    name = read(tmp_path / "results.csv")[0].provenance.device_name
    (tmp_path / "results.csv").write_text(text.replace(name, "Another machine"), encoding="utf-8")
    with pytest.raises(UserError, match="Another machine"):
        bench.main([*TINY, "--out", str(tmp_path)])


@pytest.mark.parametrize(
    "arguments",
    [["--shapes", "1,2"], ["--implementations", "other"], ["--tensor-parallel", "0"], ["--entry-clips", "some"]],
    ids=" ".join,
)
def test_wrong_arguments_are_named(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["kernels", *arguments])
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--what", "log_probs", "--implementations", "liger_fused"], "--implementations.*log_probs"),
        (["--what", "cross_entropy", "--kinds", "jsd"], "--kinds.*cross_entropy has none"),
        (["--what", "cross_entropy", "--entry-clips", "0.1"], "--entry-clips.*cross_entropy has none"),
    ],
)
def test_arguments_of_another_subject_are_refused(arguments, text, tmp_path):
    with pytest.raises(UserError, match=text):
        bench.main([*TINY, "--out", str(tmp_path), *arguments])
