"""The code behind each name of the catalogue."""

from __future__ import annotations

from copsd_tools.bench.kernels.catalogue import What
from copsd_tools.bench.kernels.subjects import cross_entropy, divergence, log_probs
from copsd_tools.bench.kernels.subjects.implementation import Subject

SUBJECTS: dict[What, Subject] = {
    "divergence": divergence.SUBJECT,
    "cross_entropy": cross_entropy.SUBJECT,
    "log_probs": log_probs.SUBJECT,
}
