"""Frozen records that cross module boundaries, with the shapes of what they hold.

Letters: B sequences of a microbatch, T its padded length, R response rows (positions whose logits predict a response
token), H hidden size, V vocabulary entries that exist, V_local rows of this rank's shard of the output weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length"]
View = Literal["student", "teacher"]


@dataclass(frozen=True)
class Problem:
    """One maths problem in one language, with what the teacher may see besides.

    Attributes:
        id: stable across runs and unique in its data set, e.g. ``mgsm_sw.tsv:17``.
        language: a code of ``megatron_copsd.languages``.
        problem: the statement in ``language``.
        problem_en: the English statement, or None where the data has none.
        solution: the English worked solution, or None.
        answer: the final answer as the data states it, or None where it cannot be graded.
        subset: name of the set that the loss may weigh it within; None for one of its source alone.
        group: what it is a variant of: problems of one source and group are drawn together. None if it stands alone.
        verbatim: its prompt is the statement and nothing else.
    """

    id: str
    language: str
    problem: str
    problem_en: str | None = None
    solution: str | None = None
    answer: str | None = None
    subset: str | None = None
    group: str | None = None
    verbatim: bool = False


@dataclass(frozen=True)
class PromptPair:
    """Token ids of both prompts of one problem; each ends where the response begins.

    Attributes:
        problem: the problem the prompts were made from.
        student_prompt: ids the student (and the engine) sees.
        teacher_prompt: ids the teacher sees; differs by the privileged context only.
        subset_weight: what the mean over its response's tokens counts in a step's loss under ``subset_mean``.
    """

    problem: Problem
    student_prompt: tuple[int, ...]
    teacher_prompt: tuple[int, ...]
    subset_weight: float = 1.0


@dataclass(frozen=True)
class VersionSpan:
    """Tokens [start, end) of a response were sampled under this weight version."""

    version: int
    start: int
    end: int


@dataclass(frozen=True)
class Rollout:
    """One response as the engine tokenised it; its ids are never decoded and encoded again.

    Attributes:
        response: token ids, including the stop token when ``finish_reason`` is ``stop``.
        token_log_probs: log-probability of each id under the engine's weights at the sampling temperature, before
            top_p/top_k; same length as ``response``.
        finish_reason: ``stop`` (a stop id was sampled) or ``length`` (cut at the token limit; nothing is appended).
        weight_version: label of the weights that sampled it; of the last token where they changed on the way.
        text: the response decoded, for people and graders only.
        versions: which weights sampled which tokens, where the engine says so.
    """

    response: tuple[int, ...]
    token_log_probs: tuple[float, ...]
    finish_reason: FinishReason
    weight_version: int
    text: str
    versions: tuple[VersionSpan, ...] = ()

    @property
    def token_versions(self) -> list[int]:
        """Weight version that sampled each token; same length as ``response``."""
        spans = self.versions or (VersionSpan(self.weight_version, 0, len(self.response)),)
        return [span.version for span in spans for _ in range(span.start, span.end)]


@dataclass(frozen=True)
class Sample:
    """One training sequence: a prompt pair and the response both views are scored on.

    Attributes:
        pair: the two prompts.
        rollout: the response; for supervised training, the reference response in the same form.
        index: position in the global batch, the same under every parallel layout.
        advantage: policy-gradient weight of the response (GRPO); 1 elsewhere.
        reward: 1.0 for a correct final answer, 0.0 otherwise; None where the objective does not have it graded.
    """

    pair: PromptPair
    rollout: Rollout
    index: int
    advantage: float = 1.0
    reward: float | None = None


@dataclass(frozen=True)
class Microbatch:
    """Sequences of one view, ready for the model: right-padded, or packed behind each other in one row.

    Rows follow (sequence, position) order, so the r-th response row of the student's microbatch and of the teacher's
    are the same token of the same response.

    Attributes:
        tokens: int64 [B, T], prompt then response, padded on the right; B is 1 where packed.
        position_ids: int64 [B, T]; they start at 0 with each sequence.
        loss_mask: bool [B, T], true where the logits predict a response token.
        padding: bool [B, T], true behind the last token of each sequence.
        labels: int64 [R], the response token each row predicts.
        row_weights: float32 [R]; the loss is the plain sum of weight times token loss, so the division by the
            global token count (or by sequence lengths) is already in them.
        sampled_log_probs: float32 [R], log-probability of each label under the policy that sampled it; 0 in responses
            of the data.
        sample_indices: ``Sample.index`` of each sequence.
        response_lengths: rows of each sequence; sums to R.
        row_numbers: int64 [R], 0 to R - 1.
        packed_lengths: tokens of each sequence where they are packed, padding included; sums to T. None where not.

    A context-parallel rank's part of a microbatch has some of its columns, T / CP, and the R rows that lie there;
    ``row_numbers`` are those rows' in the whole microbatch, and the lengths are those of the whole.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    loss_mask: torch.Tensor
    padding: torch.Tensor
    labels: torch.Tensor
    row_weights: torch.Tensor
    sampled_log_probs: torch.Tensor
    sample_indices: tuple[int, ...]
    response_lengths: tuple[int, ...]
    row_numbers: torch.Tensor
    packed_lengths: tuple[int, ...] | None


@dataclass(frozen=True)
class VocabShard:
    """Which vocabulary entries one rank's shard of the output weight holds.

    Attributes:
        start: vocabulary id of the shard's first row.
        rows: rows of the shard, V_local, padding included.
        vocab_size: V, entries that exist; rows whose id is V or more are padding and never reach a softmax.
    """

    start: int
    rows: int
    vocab_size: int

    @property
    def valid(self) -> int:
        """Rows of this shard that are real vocabulary entries (0 for a shard made of padding alone)."""
        return max(0, min(self.rows, self.vocab_size - self.start))


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did, as plain numbers, equal on every rank.

    Attributes:
        step: steps done, this one included.
        loss: the objective's value over the global batch.
        grad_norm: norm of the gradient before clipping.
        learning_rate: the one this step used.
        num_loss_tokens: response rows over the global batch.
        metrics: further named numbers (divergence statistics, reward, lengths).
        seconds: wall time by phase.
        fault: what was not finite, where the step was not applied for it.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_loss_tokens: int
    metrics: dict[str, float]
    seconds: dict[str, float]
    fault: str | None = None
