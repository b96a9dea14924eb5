"""Whether the engine samples from the policy that the trainer has: their log-probabilities of the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_copsd.errors import UserError, describe
from megatron_copsd.methods.likelihood import trainer_log_probs
from megatron_copsd.run import Run
from megatron_copsd.types import Microbatch, Sample


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
    found = trainer_log_probs(run.model, run.ddp, batches, run.config, run.config.rollout.temperature)
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
