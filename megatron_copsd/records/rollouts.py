"""Rollouts on disk, one JSONL file a step: what was asked, what was answered, and how far the teacher disagreed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_copsd.records.disk import replacing, writing
from megatron_copsd.types import Sample


def write_rollouts(
    path: Path,
    step: int,
    samples: Sequence[Sample],
    token_losses: Mapping[int, Sequence[float]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the rollouts of a step on the main process; elsewhere do nothing.

    Args:
        path: the file to make.
        step: number of the step that used these rollouts.
        samples: the global batch.
        token_losses: per-token divergence (or negative log-likelihood) of each sample, by ``Sample.index``; null is
            written where one is not finite.
        tokenizer: decodes the prompts for people.

    Raises:
        UserError: the disk is full, or refuses the file.
    """
    if dist.get_rank() != 0:
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        _write(partial, step, samples, token_losses, tokenizer)


def _write(
    path: Path,
    step: int,
    samples: Sequence[Sample],
    token_losses: Mapping[int, Sequence[float]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    with path.open("w", encoding="utf-8") as file:
        for sample in samples:
            pair, rollout = sample.pair, sample.rollout
            record = {
                "step": step,
                "index": sample.index,
                "problem_id": pair.problem.id,
                "language": pair.problem.language,
                "student_prompt": tokenizer.decode(pair.student_prompt),
                "teacher_prompt": tokenizer.decode(pair.teacher_prompt),
                "response": rollout.text,
                "student_prompt_ids": pair.student_prompt,
                "teacher_prompt_ids": pair.teacher_prompt,
                "response_ids": rollout.response,
                "token_log_probs": rollout.token_log_probs,
                "token_losses": [loss if math.isfinite(loss) else None for loss in token_losses[sample.index]],
                "finish_reason": rollout.finish_reason,
                "weight_version": rollout.weight_version,
                "weight_versions": [(span.version, span.start, span.end) for span in rollout.versions],
                "reward": sample.reward,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
