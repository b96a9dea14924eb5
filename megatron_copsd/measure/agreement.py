"""Whether the engine samples from the policy that the trainer has: their log-probabilities of the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_copsd.errors import UserError, describe
from megatron_copsd.loss.cross_entropy import fused_linear_cross_entropy
from megatron_copsd.measure.reports import by_sample
from megatron_copsd.model.passes import forward_pass
from megatron_copsd.rollout.engine import Probe
from megatron_copsd.run import Run
from megatron_copsd.types import Microbatch, PromptPair, Rollout, Sample

_PROBES, _PROBE_TOKENS = 4, 256


def log_prob_agreement(
    run: Run, done: int, samples: Sequence[Sample], batches: Sequence[Microbatch]
) -> dict[str, float]:
    """Compare the rollouts' log-probabilities with the trainer's, at the sampling temperature.

    With d = log p_trainer - log p_engine of a sampled token: max |d|, mean |d|, and the mean of e^d - 1 - d, which
    estimates KL(engine||trainer) without bias (the k3 estimator). Weights and precision apart, d is 0; after a sync
    that went wrong it is not.

    Args:
        run: the run, its weights not yet updated in this step.
        done: steps done, the version of those weights: the limit is for the tokens that they sampled.
        samples: of the step.
        batches: the replica's student microbatches of them.

    Collectives: a forward-only schedule, and one all-gather of Python objects.

    Raises:
        UserError: the largest difference exceeds the limit, and the settings say to stop.
    """
    found = by_sample(run.layout, batches, _trainer_log_probs(run, batches, run.config.rollout.temperature))
    differences = torch.tensor(
        [
            ours - theirs
            for sample in samples
            for ours, theirs in zip(found[sample.index], sample.rollout.token_log_probs, strict=True)
        ],
        dtype=torch.float64,
    )
    largest = float(differences.abs().max())
    settings = run.config.rollout
    # What was interrupted in place goes on with keys and values of the old weights, and has to differ.
    mixed = run.config.sglang.pause == "in_place"
    current = torch.tensor(
        [
            version == done and not (mixed and len(sample.rollout.versions) > 1)
            for sample in samples
            for version in sample.rollout.token_versions
        ]
    )
    comparable = float(differences[current].abs().max()) if current.any() else 0.0
    if not comparable <= settings.agreement_limit:  # NaN is not
        rule = f"a token's log-probability of engine and trainer differs by {comparable:.4g} nats"
        if settings.agreement_failure == "stop":
            remedy = "Look at the weight sync and at the engine's dtype."
            raise UserError(describe("rollout.agreement_limit", settings.agreement_limit, rule, remedy))
        if run.monitor:
            run.monitor.say(f"warning: {rule}, more than rollout.agreement_limit = {settings.agreement_limit}")
    return {
        "agreement/max_difference": largest,
        "agreement/mean_difference": float(differences.abs().mean()),
        "agreement/kl": float((differences.expm1() - differences).mean()),
    }


def probe_samples(run: Run) -> list[Sample]:
    """Return the first prompts of the training data as if all their tokens but the first were a response."""
    pairs = [pair for pair, _ in run.train_items[0][:_PROBES]]
    samples = []
    for index, pair in enumerate(pairs):
        tokens = pair.student_prompt[:_PROBE_TOKENS]
        rest = Rollout(tokens[1:], (0.0,) * (len(tokens) - 1), "length", weight_version=0, text="")
        samples.append(Sample(PromptPair(pair.problem, tokens[:1], tokens[:1]), rest, index))
    return samples


def probe_log_probs(run: Run, samples: Sequence[Sample], batches: Sequence[Microbatch]) -> list[Probe]:
    """Return the probes' tokens with the log-probabilities that the trainer's weights give them.

    Args:
        run: the run.
        samples: of ``probe_samples``.
        batches: the replica's student microbatches of them.

    Collectives: those of ``log_prob_agreement``.
    """
    found = by_sample(run.layout, batches, _trainer_log_probs(run, batches, temperature=1.0))
    return [(sample.pair.student_prompt + sample.rollout.response, tuple(found[sample.index])) for sample in samples]


def _trainer_log_probs(run: Run, batches: Sequence[Microbatch], temperature: float) -> list[torch.Tensor]:
    """Log-probabilities of each microbatch's response tokens, [R], on the last stage; none elsewhere."""

    def log_probs(index: int, hidden: torch.Tensor) -> torch.Tensor:
        batch = batches[index]
        return fused_linear_cross_entropy(
            hidden,
            run.chunks[-1].output_weight,
            batch.labels.to(hidden.device),
            batch.row_weights.to(hidden.device),
            run.shard,
            group=run.layout.tensor_group,
            temperature=temperature,
            implementation=run.config.loss.implementation,
            scratch_bytes=run.config.loss.scratch_bytes,
        ).token_log_probs

    return forward_pass(run.ddp, batches, log_probs)
