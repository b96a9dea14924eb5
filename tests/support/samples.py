"""Samples of untidy lengths, for tests of batching."""

from __future__ import annotations

import torch

from megatron_copsd.types import Problem, PromptPair, Rollout, Sample

VOCAB = 23


def sample(index: int, student: int, teacher: int, response: int, advantage: float = 1.0) -> Sample:
    """Random ids with these lengths; id 0 occurs in the text as well as in the padding."""
    generator = torch.Generator().manual_seed(index)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCAB, (length,), generator=generator).tolist())

    pair = PromptPair(Problem(f"x:{index}", "SWA", "?"), ids(student), ids(teacher))
    return Sample(pair, Rollout(ids(response), (0.0,) * response, "stop", 0, ""), index, advantage)


SAMPLES = [
    sample(0, 3, 7, 5), sample(1, 1, 2, 1), sample(2, 6, 6, 2, -0.5), sample(3, 2, 9, 8), sample(4, 4, 5, 3, 2.0),
    sample(5, 5, 5, 1), sample(6, 1, 12, 4),
]  # fmt: skip
TOTAL = sum(len(s.rollout.response) for s in SAMPLES)
