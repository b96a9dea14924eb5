"""Every argument of the losses' and kernels' public functions is checked, by a table that signatures must match.

What a function is given wrong is refused before any work, by one error that names it. Triton's own are tested without
launching a kernel: a check that came after the launch would come too late.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from divergence_cases import HIDDEN, ROWS, VOCAB, inputs
from torch import Tensor

from copsd_kernels import chunk_rows, reference, rows, torch_rows
from copsd_kernels.rows import DivergenceTerms, LogitsGradient, SoftmaxStatistics
from copsd_kernels.streaming import tiles
from copsd_kernels.streaming.tiles import Operand
from megatron_copsd.errors import UserError
from megatron_copsd.loss import cross_entropy, divergence, implementation
from megatron_copsd.loss.autograd import GradientOptions
from megatron_copsd.loss.cross_entropy import fused_linear_cross_entropy
from megatron_copsd.loss.divergence import fused_linear_divergence
from megatron_copsd.loss.spec import DivergenceSpec
from megatron_copsd.types import VocabShard

# Whose public functions the table has, all of them. The walks (``chunked``, ``streaming``, ``autograd``, ``shards``)
# and the products of ``gemm`` get what these have checked; torch itself refuses products of other shapes.
MODULES = (divergence, cross_entropy, implementation, reference, torch_rows, chunk_rows, tiles)

STUDENT, TEACHER, WEIGHT, ROW_WEIGHTS = inputs(dtype=torch.float32)
LOGITS, LABELS = torch.randn(ROWS, VOCAB), torch.zeros(ROWS, dtype=torch.int64)
NUMBERS = torch.ones(ROWS, dtype=torch.float64)
MERGED = SoftmaxStatistics(NUMBERS, NUMBERS, NUMBERS)
TERMS, SHARD = DivergenceTerms("jsd", 0.5, 1.0, None), VocabShard(0, VOCAB, VOCAB)
GRADIENT = LogitsGradient(NUMBERS, NUMBERS, torch.empty_like(LOGITS))
OPERAND = Operand(STUDENT.detach(), WEIGHT.detach())
WORK = torch.empty(3, 4, VOCAB)
MEANT = "meta"  # a device of its own


def tensors(good: Tensor) -> list[object]:
    """What no tensor of this shape, dtype and device may be replaced by."""
    shape = good.shape
    longer, shorter = (good.new_zeros(shape[0] + change, *shape[1:]) for change in (1, -1))
    wider = [good.new_zeros(*shape[:-1], shape[-1] + 1)] if len(shape) > 1 else []
    other_dtype = torch.int64 if good.is_floating_point() else torch.float32
    return [None, 1.0, longer, shorter, *wider, good.new_zeros(*shape, 1), good.new_zeros(()), good.to(other_dtype),
            good.half(), torch.zeros_like(good, device=MEANT)]  # fmt: skip


def rows_of(good: Tensor) -> list[object]:
    """The same for one number a row, as kernels read it."""
    return [*tensors(good), good.new_zeros(2 * ROWS)[::2], good.new_zeros(1).expand(ROWS)]


NO_NUMBERS = [0, -1.0, float("nan"), float("inf"), "1", True, torch.ones(())]
NO_COUNTS = [0, -1, 1.5, "1", True]
OFFSETS = [-1, 0.0, True, None]
WORDS = ["", "other", None, 1]
FLAGS = [None, 1, "yes"]
SHARDS = [
    None, (0, VOCAB, VOCAB), replace(SHARD, rows=VOCAB - 1), replace(SHARD, start=1), replace(SHARD, start=-1),
    replace(SHARD, vocab_size=VOCAB + 1), replace(SHARD, vocab_size=0), VocabShard(0.0, VOCAB, VOCAB),
]  # fmt: skip
OPTIONS = [
    None, GradientOptions(recompute=1), GradientOptions(partial_hidden_gradient=None),
    *(GradientOptions(weight_gradient=wrong) for wrong in tensors(WEIGHT) if wrong is not None),
]  # fmt: skip
STATISTICS = [None, NUMBERS, *(replace(MERGED, maximum=wrong) for wrong in tensors(NUMBERS)),
              *(replace(MERGED, log_sum=wrong) for wrong in tensors(NUMBERS))]  # fmt: skip
GRADIENTS = [GRADIENT.out, *(replace(GRADIENT, scale=wrong) for wrong in rows_of(NUMBERS)),
             *(replace(GRADIENT, total=wrong) for wrong in rows_of(NUMBERS)),
             *(replace(GRADIENT, out=wrong) for wrong in [*tensors(LOGITS), torch.empty(VOCAB, ROWS).t()])]  # fmt: skip
OPERANDS = [None, STUDENT, *(replace(OPERAND, hidden=wrong) for wrong in tensors(OPERAND.hidden)),
            replace(OPERAND, hidden=torch.empty(HIDDEN, ROWS).t()), replace(OPERAND, weight=WEIGHT[:, :1]),
            replace(OPERAND, weight=None)]  # fmt: skip
COLUMNS = [None, 3, slice(0, VOCAB + 1), slice(-1, VOCAB), slice(None, VOCAB), slice(5, 4), slice(0, None)]


@dataclass(frozen=True)
class Case:
    """A function, a call of it that is right, and for each of its arguments what is wrong in its place."""

    function: Callable[..., Any]
    right: dict[str, object]
    wrong: dict[str, list[Any]]


LAYER: dict[str, list[Any]] = {
    "weight": [w for w in tensors(WEIGHT.detach()) if not (isinstance(w, Tensor) and w.device.type == MEANT)],
    "shard": SHARDS,
    "group": ["tp", 2],
    "scratch_bytes": NO_COUNTS,
    "implementation": WORDS,
    "gradient_options": OPTIONS,
    "row_weights": [
        *tensors(ROW_WEIGHTS),
        ROW_WEIGHTS.clone().requires_grad_(),
        ROW_WEIGHTS.new_full((ROWS,), torch.nan),
    ],
}
DIVERGENCE = Case(
    fused_linear_divergence,
    {"student_hidden": STUDENT, "teacher_hidden": TEACHER, "weight": WEIGHT, "spec": DivergenceSpec(),
     "row_weights": ROW_WEIGHTS, "shard": SHARD},
    {**LAYER, "student_hidden": tensors(TEACHER), "teacher_hidden": tensors(TEACHER),
     "teacher_weight": [wrong for wrong in tensors(WEIGHT.detach()) if wrong is not None],
     "spec": ["jsd", None, DivergenceSpec(teacher_top_k=VOCAB + 1)]},
)  # fmt: skip
CROSS_ENTROPY = Case(
    fused_linear_cross_entropy,
    {"hidden": STUDENT, "weight": WEIGHT, "labels": LABELS, "row_weights": ROW_WEIGHTS, "shard": SHARD},
    {**LAYER, "hidden": tensors(TEACHER), "temperature": NO_NUMBERS,
     "labels": [*tensors(LABELS), LABELS - 1, LABELS + VOCAB, LABELS.int()]},
)  # fmt: skip
CHOICE = {"weight": [None, WEIGHT[0], LABELS[:, None]], "scratch_bytes": NO_COUNTS}
PLAN = {**CHOICE, "rows": [*NO_COUNTS, None], "views": [*NO_COUNTS, 3, None]}
CHOOSE = {"implementation": "auto", "weight": WEIGHT, "scratch_bytes": None}
ROW_CALL = {"student": LOGITS, "teacher": LOGITS, "student_statistics": MERGED, "teacher_statistics": MERGED,
            "terms": TERMS, "work": WORK, "gradient": GRADIENT}  # fmt: skip
ROW_WRONG = {"student": [*tensors(LOGITS), torch.empty(VOCAB, ROWS).t()], "teacher": tensors(LOGITS),
             "student_statistics": STATISTICS, "teacher_statistics": STATISTICS, "terms": [None, "jsd"],
             "work": [None, WORK[0], WORK[:, :, 1:], WORK.double()], "gradient": GRADIENTS}  # fmt: skip
TILE_CALL = {"student": OPERAND, "teacher": OPERAND, "student_statistics": MERGED, "teacher_statistics": MERGED,
             "terms": TERMS, "columns": slice(0, VOCAB), "sums": True, "gradient": GRADIENT}  # fmt: skip
LABEL_WRONG = {"labels": rows_of(LABELS), "first_id": OFFSETS, "temperature": NO_NUMBERS, "scale": rows_of(NUMBERS),
               "out": [*tensors(LOGITS), torch.empty(VOCAB, ROWS).t()], "merged": STATISTICS}  # fmt: skip
ORACLE = {"logits": [None, LOGITS[0], LABELS[:, None]], "temperature": NO_NUMBERS}

CASES = {
    "fused_linear_divergence": DIVERGENCE,
    "fused_linear_cross_entropy": CROSS_ENTROPY,
    "implementation.choose": Case(implementation.choose, CHOOSE, {**CHOICE, "implementation": WORDS, "top_k": FLAGS}),
    "implementation.implementation_of": Case(
        implementation.implementation_of, CHOOSE, {**CHOICE, "implementation": WORDS, "top_k": FLAGS}
    ),
    "implementation.explain": Case(
        implementation.explain, {**CHOOSE, "rows": 3, "views": 2}, {**PLAN, "implementation": WORDS, "top_k": FLAGS}
    ),
    "implementation.plan_scratch": Case(
        implementation.plan_scratch,
        {**CHOOSE, "implementation": "torch", "rows": 3, "views": 2},
        {**PLAN, "implementation": [*WORDS, "auto"], "differentiate": FLAGS},
    ),
    "reference.divergence": Case(
        reference.divergence,
        {"student_logits": LOGITS, "teacher_logits": LOGITS, "kind": "jsd"},
        {"student_logits": ORACLE["logits"], "teacher_logits": tensors(LOGITS), "kind": WORDS,
         "jsd_weight": [*NO_NUMBERS, 1.0], "temperature": NO_NUMBERS, "entry_clip": NO_NUMBERS,
         "token_clip": NO_NUMBERS},
    ),
    "reference.token_log_prob": Case(
        reference.token_log_prob, {"logits": LOGITS, "labels": LABELS}, {**ORACLE, "labels": tensors(LABELS)}
    ),
    "reference.entropy": Case(reference.entropy, {"logits": LOGITS}, ORACLE),
    "tiles.statistics": Case(
        tiles.statistics,
        {"views": (OPERAND,), "temperature": 1.0, "labels": LABELS},
        {"views": [(), (OPERAND, OPERAND), *((wrong,) for wrong in OPERANDS)], "temperature": NO_NUMBERS,
         "labels": [wrong for wrong in rows_of(LABELS) if wrong is not None], "first_id": OFFSETS},
    ),
    "tiles.divergence": Case(
        tiles.divergence,
        TILE_CALL,
        {"student": OPERANDS, "teacher": OPERANDS, "student_statistics": STATISTICS, "teacher_statistics": STATISTICS,
         "terms": [None, "jsd"], "columns": [*COLUMNS, slice(0, 3)], "sums": FLAGS, "gradient": GRADIENTS},
    ),
    "tiles.cross_entropy_dlogits": Case(
        tiles.cross_entropy_dlogits,
        {"operand": OPERAND, "merged": MERGED, "labels": LABELS, "first_id": 0, "temperature": 1.0, "scale": NUMBERS,
         "columns": slice(0, VOCAB), "out": torch.empty_like(LOGITS)},
        {**LABEL_WRONG, "operand": OPERANDS, "columns": [*COLUMNS, slice(0, 3)]},
    ),
}  # fmt: skip


def _columns(wrong: object) -> object:
    """What the logits of some other number of rows have in common with the right ones."""
    if not isinstance(wrong, Tensor) or wrong.dim() != 2 or wrong.device.type == MEANT or wrong.stride(1) != 1:
        return None
    return wrong.shape[1], wrong.dtype


for module, work in ((torch_rows, WORK), (chunk_rows, WORK[:0, :0])):
    short = module.__name__.rpartition(".")[2]
    logits = {"logits": [*tensors(LOGITS), torch.empty(VOCAB, ROWS).t()], "work": ROW_WRONG["work"]}
    # Any number of rows is right where there is nothing else to count them by.
    alone = {**logits, "logits": [wrong for wrong in logits["logits"] if _columns(wrong) != (VOCAB, torch.float32)]}
    right = {"logits": LOGITS.clone(), "temperature": 1.0, "work": work}
    CASES[f"{short}.statistics"] = Case(module.statistics, right, {**alone, "temperature": NO_NUMBERS})
    for name in ("divergence_rows_", "divergence_dlogits_"):
        CASES[f"{short}.{name}"] = Case(getattr(module, name), {**ROW_CALL, "work": work}, ROW_WRONG)
    CASES[f"{short}.cross_entropy_dlogits_"] = Case(
        module.cross_entropy_dlogits_,
        {**right, "merged": MERGED, "labels": LABELS, "first_id": 0, "scale": NUMBERS, "out": torch.empty_like(LOGITS)},
        {**LABEL_WRONG, **logits},
    )
TRITON = ("tiles.", "chunk_rows.")


def test_the_table_has_every_public_function() -> None:
    public = {
        function
        for module in MODULES
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }
    assert {case.function for case in CASES.values()} == public


@pytest.mark.parametrize("name", CASES)
def test_every_argument_is_checked(name: str) -> None:
    case = CASES[name]
    assert set(case.wrong) == set(inspect.signature(case.function).parameters)
    for argument, values in case.wrong.items():
        assert values
        for number, value in enumerate(values):
            call = {**case.right, argument: value}
            with pytest.raises(UserError) as caught:
                case.function(**call)
            assert len(str(caught.value).splitlines()) == 1, (argument, number)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(TRITON)])
def test_the_call_it_starts_from_is_right(name: str) -> None:
    CASES[name].function(**CASES[name].right)


def test_the_error_names_argument_value_rule_and_remedy() -> None:
    with pytest.raises(UserError, match=r"^fused_linear_divergence: row_weights: \[12\]: must have the shape \[R\] "
                       r"with R = 13, as student_hidden has it\. Pass"):  # fmt: skip
        fused_linear_divergence(**{**DIVERGENCE.right, "row_weights": ROW_WEIGHTS[1:]})


@pytest.mark.parametrize("wrong", [{"parts": NUMBERS}, {"parts": torch.ones(2, ROWS, 4, dtype=torch.float64)}])
def test_parts_that_are_joined(wrong: dict[str, Tensor]) -> None:
    with pytest.raises(UserError, match="parts"):
        rows.merge_statistics(**wrong)


@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_labels_of_any_stride_are_read_as_they_are(layout: str) -> None:
    labels = torch.arange(2 * ROWS)[::2] % VOCAB if layout == "strided" else torch.full((1,), 5).expand(ROWS)
    wanted = fused_linear_cross_entropy(**{**CROSS_ENTROPY.right, "labels": labels.clone()})
    found = fused_linear_cross_entropy(**{**CROSS_ENTROPY.right, "labels": labels})
    for one, other in zip(*(torch.autograd.grad(x.loss, (STUDENT, WEIGHT)) for x in (wanted, found)), strict=True):
        assert torch.equal(one, other)
