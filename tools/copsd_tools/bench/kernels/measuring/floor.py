"""The matrix products that no implementation can do without, by BLAS alone: what the others are measured against."""

from __future__ import annotations

from pathlib import Path

import torch

from copsd_tools.bench.kernels.cases import Case, Inputs
from copsd_tools.bench.kernels.subjects.registry import SUBJECTS

_MEMORY_SHARE = 16


class GemmFloor:
    """Logits of all views in one product, [2R, H] x [H, V] for a divergence; dX, and dW unless the weight is frozen.

    All in the dtype of the case, results too, and into buffers made beforehand. Rows are cut into slices where their
    logits would take more than a sixteenth of the memory, which leaves slices large enough not to slow the products.
    """

    def __init__(self, case: Case, inputs: Inputs) -> None:
        subject = SUBJECTS[case.what]
        row_bytes = subject.views * case.local_vocab * case.torch_dtype.itemsize
        count = -(-case.rows * row_bytes * _MEMORY_SHARE // memory_bytes(case.device))
        self._student = inputs.student_hidden.detach().tensor_split(count)
        views = (self._student, inputs.teacher_hidden.tensor_split(count))[: subject.views]
        self._stacked = [torch.cat(parts) for parts in zip(*views, strict=True)]
        self._weight = inputs.weight.detach()
        self._logits = self._weight.new_empty(len(self._stacked[0]), case.local_vocab)
        self._hidden_gradient = torch.empty_like(self._student[0]) if subject.differentiated else None
        wants_weight = subject.differentiated and not case.frozen_weight
        self._weight_gradient = torch.empty_like(self._weight) if wants_weight else None
        units = subject.floor_units(case)
        self.note = f"{units} product{'s' if units > 1 else ''}" + (f", in {count} slices of rows" if count > 1 else "")

    @torch.no_grad()
    def run(self) -> None:
        """All products once."""
        for index, (student, stacked) in enumerate(zip(self._student, self._stacked, strict=True)):
            logits = self._logits[: len(stacked)]
            torch.mm(stacked, self._weight.t(), out=logits)
            dlogits = logits[: len(student)]  # any numbers will do
            if self._hidden_gradient is not None:
                torch.mm(dlogits, self._weight, out=self._hidden_gradient[: len(student)])
            if self._weight_gradient is not None:
                # Only the first slice overwrites; a factor of 0 reads nothing.
                self._weight_gradient.addmm_(dlogits.t(), student, beta=min(index, 1))


def memory_bytes(device: str) -> int:
    """Memory of the current GPU, or of this machine."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    kilobytes = Path("/proc/meminfo").read_text(encoding="ascii").split("MemTotal:")[1].split()[0]
    return int(kilobytes) << 10
