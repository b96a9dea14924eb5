"""SDRRL's objective in its own words, by transformers in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from small_tokenizer import small_tokenizer
from transformers import AutoModelForCausalLM

_LABELS = {"EN": ("Problem", "Solution"), "SWA": ("Swali", "Suluhisho")}


def subset_sum(folder: Path, rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the sum over subsets of the mean over their responses of the means over their tokens.

    Args:
        folder: an HF model that has the small tokenizer.
        rows: of a build, with plain prompts.
    """
    tokenizer, model = small_tokenizer(), AutoModelForCausalLM.from_pretrained(folder).double()
    losses: dict[str, list[float]] = {}
    for row in rows:
        asked, answered = _LABELS[row["language"]]
        text = row["problem"].strip()
        framed = text if row.get("verbatim") else f"{asked}: {text}\n{answered}:"
        prompt = tokenizer(framed, add_special_tokens=False).input_ids
        response = [*tokenizer(f" {row['solution'].strip()}", add_special_tokens=False).input_ids, 1]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        found = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])
        losses.setdefault(row["subset"], []).append(-float(found.mean()))
    return sum(sum(found) / len(found) for found in losses.values())
