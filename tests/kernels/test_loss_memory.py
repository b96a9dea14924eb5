"""The fused losses never hold the batch's logits: every tensor that they make is watched."""

import csv

import pytest
import torch
from allocations import WatchAllocations
from divergence_cases import KINDS

from copsd_tools.bench import command as bench
from megatron_copsd.loss.cross_entropy import fused_linear_cross_entropy
from megatron_copsd.loss.divergence import DivergenceSpec, fused_linear_divergence
from megatron_copsd.types import VocabShard

HIDDEN, VOCAB = 16, 4096
SCRATCH_BYTES = 1 << 20
LOSSES = (*KINDS, "cross_entropy")


def watch(loss: str, rows: int, dtype: torch.dtype, entry_clip: float | None = None) -> WatchAllocations:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(rows, HIDDEN, generator=generator).to(dtype).requires_grad_()
    teacher = torch.randn(rows, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype).requires_grad_()
    row_weights, shard = torch.ones(rows), VocabShard(start=0, rows=VOCAB, vocab_size=VOCAB)
    with WatchAllocations() as watched:
        if loss == "cross_entropy":
            labels = torch.zeros(rows, dtype=torch.int64)
            result = fused_linear_cross_entropy(
                student, weight, labels, row_weights, shard, temperature=0.5, scratch_bytes=SCRATCH_BYTES
            )
        else:
            spec = DivergenceSpec(loss, temperature=0.5, entry_clip=entry_clip)
            result = fused_linear_divergence(
                student, teacher, weight, spec, row_weights, shard, scratch_bytes=SCRATCH_BYTES
            )
        result.loss.backward()
    return watched


def test_the_watch_sees_what_dense_code_allocates():
    hidden, weight = torch.randn(64, HIDDEN), torch.randn(VOCAB, HIDDEN)
    with WatchAllocations() as watched:
        (hidden @ weight.t()).log_softmax(-1).sum()
    assert watched.largest_numel == 64 * VOCAB
    assert watched.peak_bytes >= 2 * 64 * VOCAB * 4


@pytest.mark.parametrize("entry_clip", [None, 1e-4], ids=["no clip", "entry clip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_logits_of_the_batch_never_exist(loss, dtype, entry_clip):
    rows = 512
    watched = watch(loss, rows, dtype, entry_clip)
    rounded_bytes = 0 if dtype == torch.float32 else dtype.itemsize
    gradient_bytes = (rows + VOCAB) * HIDDEN * (4 + rounded_bytes)
    row_bytes = rows * 8 * 24
    assert rows * VOCAB * 4 >= 8 * SCRATCH_BYTES
    assert watched.largest_numel * 4 <= max(SCRATCH_BYTES, VOCAB * HIDDEN * 4)
    assert watched.peak_bytes <= SCRATCH_BYTES + gradient_bytes + row_bytes


@pytest.mark.parametrize("loss", LOSSES)
def test_peak_memory_does_not_grow_with_rows_times_vocabulary(loss):
    few, many = (watch(loss, rows, torch.float32) for rows in (128, 512))
    # What may grow: float32 hidden gradients and a few float64 numbers for each row.
    assert many.peak_bytes - few.peak_bytes <= (512 - 128) * (2 * HIDDEN * 4 + 24 * 8)


def test_benchmark_reports_the_same(tmp_path, capsys):
    """The command line, end to end: resident memory of fresh processes instead of watched tensors."""
    path = tmp_path / "loss.csv"
    shape = ["--rows", "512", "--hidden", "32", "--vocab", "16384", "--scratch-mb", "4", "--threads", "1"]
    assert bench.main(["loss", *shape, "--repeats", "1", "--check-rows", "4", "--csv", str(path)]) == 0
    assert "fused / dense" in capsys.readouterr().out
    with path.open(encoding="utf-8") as file:
        fused, dense = csv.DictReader(file)
    assert (fused["implementation"], dense["implementation"]) == ("fused", "dense")
    assert float(fused["peak_mib"]) < float(dense["peak_mib"]) / 4
    assert float(fused["hidden_error"]) < 1e-4
    assert float(fused["weight_error"]) < 1e-4
