"""Whether the engine samples from the policy that the trainer has: their log-probabilities of the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_copsd.assemble import Run
from megatron_copsd.errors import UserError, describe
from megatron_copsd.loss.cross_entropy import fused_linear_cross_entropy
from megatron_copsd.model.passes import forward_pass
from megatron_copsd.reports import by_sample
from megatron_copsd.types import Microbatch, Sample


def log_prob_agreement(run: Run, samples: Sequence[Sample], batches: Sequence[Microbatch]) -> dict[str, float]:
    """Compare the rollouts' log-probabilities with the trainer's, at the sampling temperature.

    With d = log p_trainer - log p_engine of a sampled token: max |d|, mean |d|, and the mean of e^d - 1 - d, which
    estimates KL(engine||trainer) without bias (the k3 estimator). Weights and precision apart, d is 0; after a sync
    that went wrong it is not.

    Args:
        run: the run, its weights not yet updated in this step.
        samples: of the step.
        batches: the replica's student microbatches of them.

    Collectives: a forward-only schedule, and one all-gather of Python objects.

    Raises:
        UserError: the largest difference exceeds the limit, and the settings say to stop.
    """
    found = by_sample(run.layout, batches, _trainer_log_probs(run, batches))
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
    fresh = all(sample.rollout.weight_version == samples[0].rollout.weight_version for sample in samples)
    if largest > settings.agreement_limit and fresh and not settings.ahead:
        rule = f"a token's log-probability of engine and trainer differs by {largest:.4g} nats"
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


def _trainer_log_probs(run: Run, batches: Sequence[Microbatch]) -> list[torch.Tensor]:
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
            temperature=run.config.rollout.temperature,
            implementation=run.config.loss.implementation,
            scratch_bytes=run.config.loss.scratch_bytes,
        ).token_log_probs

    return forward_pass(run.ddp, batches, log_probs)
