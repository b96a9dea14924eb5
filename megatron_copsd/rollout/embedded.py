"""The embedded engine: transformers' ``generate`` in the trainer's own process.

Every process holds a whole copy of the model and samples its share of the requests, so this engine suits models that
fit beside the trainer: development, tests, single-node runs. Production rollouts come from a server.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.released import as_released
from megatron_copsd.platform import plain_torch
from megatron_copsd.rollout.collect import collect
from megatron_copsd.rollout.engine import ProbeSource, Request, Sampling, WeightSource
from megatron_copsd.types import Rollout


class EmbeddedEngine:
    """A transformers model that samples in this process; implements ``RolloutEngine``."""

    def __init__(
        self,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int,
    ) -> None:
        """Build the model without weights; ``update_weights`` must come before ``generate``.

        Args:
            config: HF configuration of the model.
            tokenizer: decodes responses for people; its ids are not used to sample.
            dtype: dtype the engine computes in.
            device: where it computes.
            batch_size: sequences generated at once.
        """
        with plain_torch():
            # Not under torch.device(device): that is one of the modes which plain_torch suspends.
            self._model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
        # Of its own, not made of what config.json says of sampling: generate fills in from it what it is not told.
        self._model.generation_config = GenerationConfig()
        self._weights = as_released(dict(self._model.named_parameters()))
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._version: int | None = None
        self._begun: tuple[Sequence[Request], Sampling] | None = None

    @property
    def weight_version(self) -> int | None:
        """Version of the weights it has; None before the first update."""
        return self._version

    def update_weights(self, source: WeightSource, weight_version: int, probes: ProbeSource | None = None) -> None:
        """Copy full weights over the engine's own."""
        missing = set(self._weights)
        with torch.no_grad():
            for bucket in source():
                for name, tensor in zip(bucket.names, bucket.tensors, strict=True):
                    self._weights[name].copy_(tensor)
                    missing.discard(name)
        assert not missing, f"the weight sync left out {sorted(missing)}"
        self._version = weight_version

    def begin(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Note the requests: there is nobody but this process to sample them, which ``finish`` does."""
        self._begun = requests, sampling

    def finish(self, weight_version: int) -> list[Rollout]:
        """Sample this process's share of the requests and return all rollouts.

        Collectives: one all-gather of Python objects over the world.
        """
        assert self._begun is not None, "finish before begin"
        (requests, sampling), self._begun = self._begun, None
        return collect(self.generate, requests, sampling)

    def rest(self) -> None:
        """The model stays where it is."""

    def close(self) -> None:
        """Nothing to give back."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """Sample one response a request in this process, in order.

        Raises:
            UserError: a prompt with its response would exceed the model's positions.
        """
        assert self._version is not None, "generate before the first weight sync"
        self._check(requests, sampling)
        rollouts: list[Rollout] = []
        with plain_torch(), torch.inference_mode():
            for start in range(0, len(requests), self._batch_size):
                rollouts += self._generate_batch(requests[start : start + self._batch_size], sampling)
        return rollouts

    def _check(self, requests: Sequence[Request], sampling: Sampling) -> None:
        limit = self._model.config.max_position_embeddings
        longest = max((len(request.prompt) for request in requests), default=0)
        if longest + sampling.max_tokens > limit:
            rule = f"with the longest prompt of {longest} tokens it exceeds the model's {limit} positions"
            remedy = "Lower it, or lower prompt.max_student_tokens."
            raise UserError(describe("rollout.max_response_tokens", sampling.max_tokens, rule, remedy))

    def _generate_batch(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        device = self._model.device
        width = max(len(request.prompt) for request in requests)
        # Any valid id pads: the mask alone says what is padding.
        pad = sampling.stop_ids[0]
        tokens = torch.full((len(requests), width), pad, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, request in enumerate(requests):
            tokens[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        choose = _SeededChoice([request.seed for request in requests], sampling, device)
        out = self._model.generate(
            input_ids=tokens.to(device),
            attention_mask=mask.to(device),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_tokens,
                do_sample=False,
                eos_token_id=list(sampling.stop_ids),
                pad_token_id=pad,
                use_cache=True,
            ),
            logits_processor=LogitsProcessorList([choose]),
        )
        responses = out[:, width:].tolist()
        log_probs = choose.log_probs().tolist()
        return [self._rollout(r, p, sampling) for r, p in zip(responses, log_probs, strict=True)]

    def _rollout(self, tokens: list[int], log_probs: list[float], sampling: Sampling) -> Rollout:
        stop = next((i for i, token in enumerate(tokens) if token in sampling.stop_ids), None)
        length = len(tokens) if stop is None else stop + 1
        assert self._version is not None
        return Rollout(
            response=tuple(tokens[:length]),
            token_log_probs=tuple(log_probs[:length]),
            finish_reason="length" if stop is None else "stop",
            weight_version=self._version,
            text=self._tokenizer.decode(tokens[:length], skip_special_tokens=True),
        )


class _SeededChoice(LogitsProcessor):
    """Chooses each row's next token from that row's own random numbers, and leaves ``generate`` no choice but it.

    transformers samples a batch from one generator, so a response would depend on what else is in the batch and hence
    on the parallel layout. Here each row has a generator of its own. Tokens are chosen by the exponential race
    (argmax of p / E with E ~ Exp(1), the Gumbel-max trick): rounding changes the winner only where two tokens are
    level, whereas inverting a running sum over the vocabulary moves all of its boundaries.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, device: torch.device) -> None:
        self._temperature = sampling.temperature
        self._warpers: list[LogitsProcessor] = []
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self._log_probs: list[torch.Tensor] = []
        if self._temperature:
            self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores that are -inf everywhere but at the chosen token; input [rows, T] and [rows, V]."""
        scores = scores.float()
        if self._temperature:
            scores = scores / self._temperature
        log_probs = scores.log_softmax(-1)
        chosen = self._sample(input_ids, log_probs) if self._temperature else scores.argmax(-1, keepdim=True)
        self._log_probs.append(log_probs.gather(-1, chosen))
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)

    def log_probs(self) -> torch.Tensor:
        """Log-probabilities of the chosen tokens at the sampling temperature, [rows, steps]."""
        return torch.cat(self._log_probs, dim=-1).cpu()

    def _sample(self, input_ids: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
        kept = log_probs
        for warper in self._warpers:
            kept = warper(input_ids, kept)
        noise = torch.empty_like(kept)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return (kept - noise.log()).argmax(-1, keepdim=True)
