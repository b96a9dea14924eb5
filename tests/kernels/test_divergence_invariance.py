"""The fused divergence on one shard, against itself: what must not change it, and what it must be where both agree."""

from dataclasses import replace

import pytest
import torch
from divergence_cases import (
    HIDDEN,
    ROWS,
    VOCAB,
    every_clip,
    every_spec,
    fused,
    gradients,
    inputs,
)

from megatron_copsd.loss.divergence import DivergenceSpec


@every_spec
@every_clip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equal_inputs_give_exactly_zero(spec, clips, dtype, temperature):
    student, _, weight, row_weights = inputs(rows=61, dtype=dtype)
    spec = replace(spec, temperature=temperature, **clips)
    result = fused(student, student.detach().clone(), weight, row_weights, spec)
    assert result.loss == 0
    assert (result.token_divergence == 0).all()
    assert (result.top1_agreement == 1).all()
    assert all((gradient == 0).all() for gradient in gradients(result.loss, student, weight))


@every_spec
@every_clip
def test_row_order_batch_split_and_chunks_do_not_matter(spec, clips):
    student, teacher, weight, row_weights = inputs()
    spec = replace(spec, **clips)
    whole = fused(student, teacher, weight, row_weights, spec, scratch_bytes=1 << 20)
    whole_gradients = gradients(whole.loss, student, weight)

    chunked = fused(student, teacher, weight, row_weights, spec)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    parts = [order[:4], order[4:5], order[5:]]
    split = [fused(student[part], teacher[part], weight, row_weights[part], spec) for part in parts]
    rows = torch.cat([part.token_divergence for part in split])
    torch.testing.assert_close(chunked.token_divergence, whole.token_divergence)
    torch.testing.assert_close(rows, whole.token_divergence[order])
    for loss in (chunked.loss, sum(part.loss for part in split)):
        torch.testing.assert_close(loss, whole.loss)
        torch.testing.assert_close(gradients(loss, student, weight), whole_gradients)


@every_spec
@every_clip
def test_vocabulary_order_does_not_matter(spec, clips):
    student, teacher, weight, row_weights = inputs()
    spec = replace(spec, **clips)
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))
    plain = fused(student, teacher, weight, row_weights, spec)
    permuted = fused(student, teacher, weight[order], row_weights, spec)
    torch.testing.assert_close(permuted.token_divergence, plain.token_divergence)
    torch.testing.assert_close(gradients(permuted.loss, student, weight), gradients(plain.loss, student, weight))


@every_spec
@every_clip
def test_a_constant_added_to_all_logits_of_a_row_does_not_matter(spec, clips):
    student, teacher, weight, row_weights = inputs()
    spec = replace(spec, **clips)
    generator = torch.Generator().manual_seed(0)
    shifts = [torch.randn(ROWS, 1, generator=generator, dtype=torch.float64) * 5 for _ in range(2)]
    shifted_student = torch.cat((student, shifts[0]), dim=1)
    shifted_teacher = torch.cat((teacher, shifts[1]), dim=1)
    shifted_weight = torch.cat((weight, torch.ones(VOCAB, 1, dtype=torch.float64)), dim=1)
    plain = fused(student, teacher, weight, row_weights, spec)
    shifted = fused(shifted_student, shifted_teacher, shifted_weight, row_weights, spec)
    torch.testing.assert_close(shifted.token_divergence, plain.token_divergence)
    (gradient,) = gradients(shifted.loss, shifted_student)
    (wanted,) = gradients(plain.loss, student)
    torch.testing.assert_close(gradient[:, :HIDDEN], wanted)
    # The last column of the weight is all ones, so this is the sum of each row's logits gradient.
    torch.testing.assert_close(gradient[:, HIDDEN], torch.zeros(ROWS, dtype=torch.float64))


@every_spec
def test_logits_and_temperature_scale_together(spec):
    student, teacher, weight, row_weights = inputs()
    plain = fused(student, teacher, weight, row_weights, spec)
    scaled = fused(student, teacher, weight * 3, row_weights, replace(spec, temperature=3.0))
    torch.testing.assert_close(scaled.token_divergence, plain.token_divergence)
    torch.testing.assert_close(gradients(scaled.loss, student, weight), gradients(plain.loss, student, weight))


@every_clip
def test_jsd_is_symmetric(clips):
    student, teacher, weight, row_weights = inputs()
    found = fused(student, teacher, weight, row_weights, DivergenceSpec("jsd", jsd_weight=0.2, **clips))
    swapped = fused(teacher, student, weight, row_weights, DivergenceSpec("jsd", jsd_weight=0.8, **clips))
    torch.testing.assert_close(found.token_divergence, swapped.token_divergence)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_jsd_tends_to_the_divergences_at_its_ends(dtype):
    student, teacher, weight, row_weights = inputs(dtype=dtype)
    for kind, jsd_weight, share in (("forward_kl", 1e-4, 1e-4), ("reverse_kl", 1 - 1e-4, 1e-4)):
        jsd = fused(student, teacher, weight, row_weights, DivergenceSpec("jsd", jsd_weight=jsd_weight))
        limit = fused(student, teacher, weight, row_weights, DivergenceSpec(kind))
        torch.testing.assert_close(jsd.token_divergence / share, limit.token_divergence, rtol=1e-2, atol=1e-3)


@every_spec
def test_two_runs_give_the_same_bits(spec):
    student, teacher, weight, row_weights = inputs(dtype=torch.float32)
    first, second = (fused(student, teacher, weight, row_weights, spec) for _ in range(2))
    assert torch.equal(first.token_divergence, second.token_divergence)
    for a, b in zip(gradients(first.loss, student, weight), gradients(second.loss, student, weight), strict=True):
        assert torch.equal(a, b)
