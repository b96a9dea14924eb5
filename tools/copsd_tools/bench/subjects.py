"""The subjects that ``copsd bench kernels --what`` offers."""

from __future__ import annotations

from copsd_tools.bench import cross_entropy, divergence, log_probs
from copsd_tools.bench.cases import What
from copsd_tools.bench.implementation import Subject

SUBJECTS: dict[What, Subject] = {
    "divergence": divergence.SUBJECT,
    "cross_entropy": cross_entropy.SUBJECT,
    "log_probs": log_probs.SUBJECT,
}
