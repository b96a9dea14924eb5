"""The Triton kernels against the dense oracle in float64, through the fused losses.

Not collected by itself: ``test_triton.py`` runs it in a process of its own, under Triton's interpreter on CPU and
compiled where there is a GPU. What reaches no other line of a kernel is slow: further weights of JSD, and the clip of
tokens by itself, which comes after the kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from allocations import WatchAllocations
from divergence_cases import (
    CLIPS,
    KINDS,
    SPECS,
    VOCAB,
    dense,
    extreme_logits,
    fused,
    gradients,
    inputs,
    logits_as_inputs,
    relative_error,
)
from torch import Tensor

from copsd_kernels import chunk_rows, reference
from copsd_kernels.rows import LogitsGradient, merge_statistics
from copsd_kernels.streaming import tiles as streaming_tiles
from copsd_kernels.streaming.tiles import Tiling
from megatron_copsd.loss.autograd import GradientOptions
from megatron_copsd.loss.cross_entropy import fused_linear_cross_entropy
from megatron_copsd.loss.divergence import DivergenceResult, DivergenceSpec
from megatron_copsd.types import VocabShard

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
ROWS = 3  # the interpreter takes milliseconds a row
BLOCK = 32  # so that small vocabularies take several blocks, the last one cut short

OTHER_SPECS, OTHER_CLIPS = ("jsd 0.5", "jsd 0.9"), ("entry clip", "token clip")


def marked(cases: dict[str, Any], slow: Sequence[str]) -> list[Any]:
    return [pytest.param(case, id=name, marks=[pytest.mark.slow] * (name in slow)) for name, case in cases.items()]


every_spec = pytest.mark.parametrize("spec", marked(SPECS, OTHER_SPECS))
every_clip = pytest.mark.parametrize("clips", marked(CLIPS, OTHER_CLIPS))

SMALL_TILES = Tiling(rows=16, columns=BLOCK, depth=16, warps=4, stages=2)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_rows, "BLOCK", BLOCK)
    monkeypatch.setattr(streaming_tiles, "POINTER_TILINGS", dict.fromkeys(streaming_tiles.POINTER_TILINGS, SMALL_TILES))
    monkeypatch.setattr(streaming_tiles, "STATISTICS_TILINGS", {})
    monkeypatch.setattr(streaming_tiles, "ENTRIES_TILINGS", {})
    # Several programs share the columns, whatever the device.
    monkeypatch.setattr(streaming_tiles, "_processors", lambda device: 2)


@pytest.fixture(params=["chunk", "streaming"])
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def triton_fused(implementation: str) -> Callable[..., DivergenceResult]:
    """``fused`` by one of the Triton implementations."""
    return partial(fused, implementation=implementation)


def on_device(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in tensors)


def assert_matches(result: DivergenceResult, exact: Tensor, leaves: tuple[Tensor, Tensor], row_weights: Tensor) -> None:
    """Values and both gradients, within what the dtype of the inputs allows."""
    tolerance = 1e-2 if leaves[0].dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(result.token_divergence.double(), exact, rtol=1e-5, atol=2e-6)
    found, wanted = gradients(result.loss, *leaves), gradients((row_weights * exact).sum(), *leaves)
    for gradient, other in zip(found, wanted, strict=True):
        assert relative_error(gradient, other) < tolerance


@every_spec
@every_clip
@pytest.mark.parametrize(("temperature", "dtype"), [(0.5, torch.float32), (2.0, torch.bfloat16)])
def test_matches_the_oracle(triton_fused, spec, clips, temperature, dtype):
    student, teacher, weight, row_weights = on_device(*inputs(ROWS, dtype=dtype))
    spec = replace(spec, temperature=temperature, **clips)
    result = triton_fused(student, teacher, weight, row_weights, spec)
    assert_matches(result, dense(student, teacher, weight, spec), (student, weight), row_weights)


@every_spec
@every_clip
def test_diagnostics_are_those_of_the_torch_functions(triton_fused, spec, clips):
    student, teacher, weight, row_weights = on_device(*inputs(ROWS, dtype=torch.float32))
    spec = replace(spec, temperature=1.3, **clips)
    found = triton_fused(student, teacher, weight, row_weights, spec)
    wanted = fused(student, teacher, weight, row_weights, spec, implementation="torch")
    for name in vars(wanted):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-6, msg=name)


@every_spec
@pytest.mark.parametrize("clips", [{}, {"entry_clip": 1e-4}], ids=["no clip", "entry clip"])
def test_near_teacher_keeps_its_gradient_in_bfloat16(triton_fused, spec, clips):
    student, teacher, weight, row_weights = on_device(*inputs(4, 64, 100, torch.bfloat16, noise=0.02))
    spec = replace(spec, **clips)
    exact = dense(student, teacher, weight, spec)
    result = triton_fused(student, teacher, weight, row_weights, spec, scratch_bytes=1 << 20)
    torch.testing.assert_close(result.token_divergence.double(), exact, rtol=1e-3, atol=1e-7)
    found = gradients(result.loss, student, weight)
    for gradient, wanted in zip(found, gradients((row_weights * exact).sum(), student, weight), strict=True):
        assert relative_error(gradient, wanted) < 1e-2


@every_spec
@every_clip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_inputs_give_exactly_zero(triton_fused, spec, clips, dtype):
    student, _, weight, row_weights = on_device(*inputs(ROWS, dtype=dtype))
    spec = replace(spec, temperature=0.7, **clips)
    result = triton_fused(student, student.detach().clone(), weight, row_weights, spec)
    assert result.loss == 0
    assert (result.token_divergence == 0).all()
    assert (result.top1_agreement == 1).all()
    assert all((gradient == 0).all() for gradient in gradients(result.loss, student, weight))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clips", [{}, {"entry_clip": 0.05}], ids=["no clip", "entry clip"])
@pytest.mark.parametrize("temperature", [0.01, pytest.param(1.0, marks=pytest.mark.slow), 100.0])
@pytest.mark.parametrize("name", extreme_logits())
def test_extreme_logits(triton_fused, kind, clips, temperature, name):
    student, teacher, weight, row_weights = on_device(*logits_as_inputs(*extreme_logits()[name]))
    spec = DivergenceSpec(kind, temperature=temperature, **clips)
    result = triton_fused(student, teacher, weight, row_weights, spec)
    exact = dense(student, teacher, weight, spec)
    torch.testing.assert_close(result.token_divergence.double(), exact, rtol=1e-5, atol=2e-5)
    (found,), (wanted,) = gradients(result.loss, weight), gradients(exact.sum(), weight)
    largest = exact.max().item()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=(2e-5 + 2e-7 * largest) / temperature)


@every_spec
@pytest.mark.parametrize("clips", [{}, {"entry_clip": 0.02}], ids=["no clip", "entry clip"])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, BLOCK - 1), (3, BLOCK), (3, BLOCK + 1), (1, 2 * BLOCK)])
def test_shapes(triton_fused, spec, clips, rows, vocab):
    student, teacher, weight, row_weights = on_device(*inputs(rows, 5, vocab, torch.float32))
    spec = replace(spec, **clips)
    result = triton_fused(student, teacher, weight, row_weights, spec)
    exact = dense(student, teacher, weight, spec)
    torch.testing.assert_close(result.token_divergence.double(), exact, rtol=1e-5, atol=2e-6)
    found, wanted = gradients(result.loss, student, weight), gradients((row_weights * exact).sum(), student, weight)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6)


@every_spec
@every_clip
def test_padding_is_never_read(triton_fused, spec, clips):
    student, teacher, weight, row_weights = on_device(*inputs(ROWS, dtype=torch.float32))
    spec = replace(spec, **clips)
    wanted = triton_fused(student, teacher, weight, row_weights, spec)
    padded = torch.cat((weight.detach(), torch.full_like(weight[:11], torch.nan))).requires_grad_()
    shard = VocabShard(start=0, rows=len(padded), vocab_size=len(weight))
    found = triton_fused(student, teacher, padded, row_weights, spec, shard=shard)
    torch.testing.assert_close(found.token_divergence, wanted.token_divergence)
    (gradient,), (other,) = gradients(found.loss, padded), gradients(wanted.loss, weight)
    torch.testing.assert_close(gradient[: len(weight)], other, rtol=1e-5, atol=1e-7)
    assert (gradient[len(weight) :] == 0).all()


@every_spec
def test_two_runs_give_the_same_bits(triton_fused, spec):
    student, teacher, weight, row_weights = on_device(*inputs(ROWS, dtype=torch.float32))
    runs = [triton_fused(student, teacher, weight, row_weights, spec) for _ in range(2)]
    found = [gradients(run.loss, student, weight) for run in runs]
    assert torch.equal(runs[0].token_divergence, runs[1].token_divergence)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_clip
def test_recomputed_gradients_are_the_same(triton_fused, clips):
    student, teacher, weight, row_weights = on_device(*inputs(ROWS, dtype=torch.float32))
    spec = DivergenceSpec("jsd", jsd_weight=0.3, **clips)
    wanted = gradients(triton_fused(student, teacher, weight, row_weights, spec).loss, student, weight)
    options = GradientOptions(recompute=True)
    found = triton_fused(student, teacher, weight, row_weights, spec, gradient_options=options)
    torch.testing.assert_close(gradients(found.loss, student, weight), wanted, rtol=1e-6, atol=1e-7)


def test_shards_join_to_the_whole():
    """Statistics of uneven shards, one of them without columns."""
    logits = torch.randn(5, 37, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    shards = (*logits.split((20, 16, 1), dim=1), logits[:, :0])
    parts = [chunk_rows.statistics(part, 0.7, part.new_empty(0, 0, part.shape[1])) for part in shards]
    merged = merge_statistics(torch.stack(parts))
    torch.testing.assert_close(merged.log_normaliser, (logits.double() / 0.7).logsumexp(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        merged.entropy, reference.entropy(logits.double(), temperature=0.7), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_cross_entropy(implementation, dtype, temperature):
    hidden, _, weight, row_weights = on_device(*inputs(ROWS, vocab=3 * BLOCK - 5, dtype=dtype))
    labels = torch.randint(len(weight), (len(hidden),), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    shard = VocabShard(0, len(weight), len(weight))
    result = fused_linear_cross_entropy(
        hidden,
        weight,
        labels,
        row_weights,
        shard,
        temperature=temperature,
        implementation=implementation,
        scratch_bytes=20_000,
    )
    logits = hidden.double() @ weight.double().t()
    exact = reference.token_log_prob(logits, labels, temperature=temperature)
    torch.testing.assert_close(result.token_log_probs.double(), exact, rtol=1e-5, atol=2e-6)
    entropy = reference.entropy(logits, temperature=temperature)
    torch.testing.assert_close(result.entropy.double(), entropy, rtol=1e-5, atol=2e-6)
    found = gradients(result.loss, hidden, weight)
    for gradient, wanted in zip(found, gradients(-(row_weights * exact).sum(), hidden, weight), strict=True):
        assert relative_error(gradient, wanted) < (1e-2 if dtype == torch.bfloat16 else 2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entry_clip", [None, 0.05])
def test_a_gradient_in_bfloat16_is_the_one_in_float32_rounded(kind, entry_clip):
    terms = DivergenceSpec(kind, entry_clip=entry_clip).terms
    generator = torch.Generator().manual_seed(4)
    student, teacher = (torch.randn(ROWS, 2 * BLOCK - 3, generator=generator).to(DEVICE) for _ in range(2))
    work = student.new_empty(0, 0, student.shape[1])
    merged = [merge_statistics(chunk_rows.statistics(logits, 1.0, work)[None]) for logits in (student, teacher)]
    sums = chunk_rows.divergence_rows_(student, teacher, *merged, terms, work)
    scale = torch.rand(ROWS, generator=generator, dtype=torch.float64).to(DEVICE)
    total = None if terms.total_is_zero else sums.total.contiguous()
    full, rounded = torch.empty_like(student), torch.empty_like(student, dtype=torch.bfloat16)
    for out in (full, rounded):
        gradient = LogitsGradient(scale, total, out)
        chunk_rows.divergence_dlogits_(student, teacher, *merged, terms, work, gradient)
    assert full.any()
    # Triton's interpreter cuts off where hardware rounds: one unit in the last place, not half of one.
    torch.testing.assert_close(rounded.float(), full, rtol=2**-7, atol=0)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@pytest.mark.parametrize("own_weight", [False, True], ids=["shared weight", "teacher's own weight"])
def test_tiles_of_any_size_and_way_of_loading_agree(kind, own_weight, monkeypatch):
    """Pointers or descriptors, whole or partial tiles, many splits or one: the rows and both gradients."""
    student, teacher, weight, row_weights = on_device(*inputs(19, 24, 3 * BLOCK - 8, torch.float32))
    teacher_weight = (weight.detach() * 1.1) if own_weight else None
    arguments = student, teacher, weight, row_weights, DivergenceSpec(kind, entry_clip=0.05)

    def run() -> tuple[Tensor, ...]:
        result = fused(*arguments, teacher_weight=teacher_weight, implementation="streaming")
        return result.token_divergence, result.top1_agreement, *gradients(result.loss, student, weight)

    wanted = run()
    descriptors = {(streaming_tiles._generation(weight.device), torch.float32): SMALL_TILES}
    for name in ("STATISTICS_TILINGS", "ENTRIES_TILINGS"):
        monkeypatch.setattr(streaming_tiles, name, descriptors)
    assert all(torch.equal(one, other) for one, other in zip(run(), wanted, strict=True))
    large = replace(SMALL_TILES, rows=64, columns=64, depth=32)
    for name in ("STATISTICS_TILINGS", "ENTRIES_TILINGS"):
        monkeypatch.setattr(streaming_tiles, name, dict.fromkeys(descriptors, large))
    monkeypatch.setattr(streaming_tiles, "_processors", lambda device: 1)
    for found, exact in zip(run(), wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=2e-5, atol=2e-6)


def watch_streaming(loss: str, rows: int, vocab: int, scratch_bytes: int) -> tuple[WatchAllocations, WatchAllocations]:
    """What the streaming implementation allocates, with gradients and without."""
    student, teacher, weight, row_weights = on_device(*inputs(rows, 16, vocab, torch.float32))
    labels, shard = torch.zeros(rows, dtype=torch.int64, device=DEVICE), VocabShard(0, vocab, vocab)
    settings = {"scratch_bytes": scratch_bytes, "implementation": "streaming"}

    def run() -> Tensor:
        if loss == "cross_entropy":
            return fused_linear_cross_entropy(student, weight, labels, row_weights, shard, **settings).loss
        return fused(student, teacher, weight, row_weights, DivergenceSpec(loss), shard=shard, **settings).loss

    with WatchAllocations() as with_gradients:
        run().backward()
    with WatchAllocations() as without, torch.no_grad():
        run()
    return with_gradients, without


@pytest.mark.parametrize("loss", ["forward_kl", "jsd", "cross_entropy"])
def test_no_logits_of_any_size_are_ever_in_memory(loss, monkeypatch):
    """Besides gradients and a few numbers a row, only the budgeted columns of the logits' gradient."""
    monkeypatch.setattr(streaming_tiles, "POINTER_TILINGS", {torch.float32: replace(SMALL_TILES, columns=512)})
    vocab, scratch_bytes = 2048, 8 << 10
    few, many = (watch_streaming(loss, rows, vocab, scratch_bytes) for rows in (8, 32))
    row_bytes = 16 * 4 + streaming_tiles.MAX_SPLITS * 7 * 8 + 64 * 8
    for rows, (with_gradients, without) in ((8, few), (32, many)):
        gradient_bytes = (rows + vocab) * 16 * 4
        assert rows * vocab * 4 >= 8 * scratch_bytes
        assert with_gradients.peak_bytes <= scratch_bytes + 2 * gradient_bytes + rows * row_bytes
        assert without.peak_bytes <= rows * row_bytes
        assert with_gradients.largest_numel * 4 <= max(scratch_bytes, gradient_bytes)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_log_probabilities_near_zero_and_far_below(implementation, temperature):
    """A label of probability almost 1, and labels hundreds of nats down."""
    logits = torch.full((3, 2 * BLOCK + 3), -20.0)
    logits[:, 5], logits[:, 9] = 20.0, -300.0
    hidden, _, weight, row_weights = on_device(*logits_as_inputs(logits, logits))
    labels = torch.tensor([5, 9, 11], device=DEVICE)
    shard = VocabShard(0, len(weight), len(weight))
    result = fused_linear_cross_entropy(
        hidden, weight, labels, row_weights, shard, temperature=temperature, implementation=implementation
    )
    exact = reference.token_log_prob(logits.double().to(DEVICE), labels, temperature=temperature)
    torch.testing.assert_close(result.token_log_probs.double(), exact, rtol=1e-6, atol=1e-9)
    assert -1e-14 < result.token_log_probs[0] <= 0


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@pytest.mark.parametrize("k", [1, 5, VOCAB])
def test_a_teacher_cut_to_its_likeliest_tokens(kind, k):
    student, teacher, weight, row_weights = on_device(*inputs(ROWS, dtype=torch.float32))
    spec = DivergenceSpec(kind, temperature=0.7, teacher_top_k=k)
    result = fused(student, teacher, weight, row_weights, spec, implementation="chunk")
    wanted = fused(student, teacher, weight, row_weights, spec, implementation="torch")
    for name in vars(wanted):
        torch.testing.assert_close(getattr(result, name), getattr(wanted, name), rtol=1e-5, atol=1e-6, msg=name)
