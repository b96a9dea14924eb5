"""The planner against real processes: bytes held and bytes communicated by one real step over Gloo."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from layouts import selected
from processes import ROOT
from ranks import run_ranks
from tiny import make_model, settings, write_config

from megatron_copsd.hf.read import read_architecture
from megatron_copsd.plan.memory import activation_bytes, static_bytes
from megatron_copsd.plan.traffic import step_traffic, total_by_kind
from megatron_copsd.plan.workload import ITEM_BYTES, Lengths, MicrobatchShape, PlanLayout, Workload

MOMENTS, MASTER = 8, 4
ACTIVATION_TOLERANCE = 0.05


@dataclass(frozen=True, eq=False)
class Case:
    """One real run: its layout, its model and its batch."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    dtype: str = "float32"
    distributed: bool = True
    micro_batch: int = 2
    response: int = 12
    recompute_layers: int | None = None
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> PlanLayout:
        gpus = self.tensor * self.pipeline * self.data
        return PlanLayout(
            gpus,
            self.tensor,
            pipeline=self.pipeline,
            micro_batch=self.micro_batch,
            distributed_optimizer=self.distributed,
            recompute="none" if self.recompute_layers is None else "full",
            recompute_layers=self.recompute_layers,
        )

    def __str__(self) -> str:
        model = "-".join(str(value) for value in self.model.values())
        again = f"-again{self.recompute_layers}" if self.recompute_layers else ""
        return f"tp{self.tensor}-pp{self.pipeline}-dp{self.data}-{self.dtype}{again}-{model}"


FOUR_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 4}
WIDE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 8}
CORE = (
    Case(tensor=2, dtype="bfloat16", model=WIDE),
    Case(pipeline=2, model={"tie_word_embeddings": True}),
    Case(data=2, dtype="bfloat16", micro_batch=3),
    Case(tensor=2, recompute_layers=1, model={"num_hidden_layers": 3}),
)
MORE = (
    Case(),
    Case(tensor=2),
    Case(tensor=2, pipeline=2, response=30, model={"tie_word_embeddings": False}),
    Case(tensor=2, data=2, dtype="bfloat16", model={"family": "qwen2", "num_attention_heads": 8}),
    Case(data=2, distributed=False),
    Case(tensor=4, model=FOUR_HEADS),
    Case(pipeline=4, dtype="bfloat16", model=FOUR_HEADS),
    Case(data=4, micro_batch=1, model=FOUR_HEADS),
    Case(pipeline=2, recompute_layers=2, dtype="bfloat16", model={"num_hidden_layers": 6}),
)


def write_case(folder: Path, case: Case) -> Path:
    """Write the case's model and configuration; returns the configuration."""
    folder.mkdir()
    model = make_model(folder / "model", **case.model)
    tree = settings(
        folder,
        model,
        parallel={
            "tensor": case.tensor,
            "pipeline": case.pipeline,
            "recompute": case.layout.recompute,
            "recompute_layers": case.recompute_layers,
        },
        optimizer={"micro_batch_size": case.micro_batch, "distributed": case.distributed},
        rollout={"max_response_tokens": case.response},
    )
    tree["model"]["dtype"] = case.dtype
    return write_config(folder, tree)


@dataclass(frozen=True)
class Counted:
    """Where each case's ranks have written what they saw, and what they printed."""

    folders: dict[Case, Path]
    printed: str

    def ranks(self, case: Case) -> list[dict[str, Any]]:
        files = [self.folders[case] / f"{rank}.json" for rank in range(case.layout.gpus)]
        assert all(file.is_file() for file in files), self.printed
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]


@pytest.fixture(scope="module")
def counted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Counted:
    """All cases from one start of the processes."""
    folder = tmp_path_factory.mktemp("plan")
    folders = {case: folder / str(number) for number, case in enumerate(selected(request))}
    listed = [
        {"processes": case.layout.gpus, "config": str(write_case(own, case)), "folder": str(own)}
        for case, own in folders.items()
    ]
    (folder / "plan.json").write_text(json.dumps(listed), encoding="utf-8")
    worker = ROOT / "tests" / "support" / "plan_worker.py"
    count = max(case.layout.gpus for case in folders)
    return Counted(folders, run_ranks([worker, folder / "plan.json"], count, folder, groups=len(folders)))


def workload(case: Case) -> Workload:
    anything = Lengths(1, 1, 1)
    return Workload(
        sequences=6,
        longest=anything,
        typical=anything,
        dtype=case.dtype,
        implementation="torch",
        device="cpu",
        teacher="frozen",
        loss_recompute=False,
        scratch_bytes=None,
        bucket_bytes=1,
        engine="embedded",
        engine_tensor=1,
        engines=0,
        shares_gpus=True,
        concurrency=1,
    )


def check(counted: Counted, case: Case) -> None:
    model, ranks = read_architecture(str(counted.folders[case] / "model")), counted.ranks(case)
    layout, work = case.layout, workload(case)
    item = ITEM_BYTES[case.dtype]
    for rank in ranks:
        stage = rank["stage"]
        held = static_bytes(model, layout, work, stage)
        each = MOMENTS + (MASTER if case.dtype == "bfloat16" else 0)
        measured = {name: rank[name] for name in ("weights", "gradients", "optimizer")}
        optimizer = each * held.owned[rank["replica"]]
        assert measured == {"weights": held.weights, "gradients": held.gradients, "optimizer": optimizer}
        student, teacher = ([MicrobatchShape(*shape) for shape in rank[view]] for view in ("student", "teacher"))
        traffic = step_traffic(model, layout, work, student, teacher, stage)
        assert rank["traffic"] == total_by_kind(traffic)
        largest = max(student, key=lambda shape: shape.tokens)
        activations = activation_bytes(model, layout, work, largest, stage, len(student))
        if stage == layout.pipeline - 1:
            activations += largest.rows * model.hidden * item  # the gradient that the loss keeps for its backward
        assert rank["saved"] == pytest.approx(activations, rel=ACTIVATION_TOLERANCE)
        error = activations / rank["saved"] - 1
        print(f"{case} stage {stage}: {measured} saved {rank['saved']} ({error:+.2%}) {rank['traffic']}")


@pytest.mark.parametrize("case", CORE, ids=str)
def test_prediction(counted: Counted, case: Case) -> None:
    check(counted, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=str)
def test_prediction_of_further_layouts(counted: Counted, case: Case) -> None:
    check(counted, case)
