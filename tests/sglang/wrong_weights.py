"""A run whose server is given other weights behind the trainer's back; run by test_training.py."""

from __future__ import annotations

import sys

from megatron_copsd import platform
from megatron_copsd.config.load import load_config
from megatron_copsd.errors import UserError

with platform.importing_megatron():
    from megatron_copsd.measure.agreement import log_prob_agreement
    from megatron_copsd.run import assemble
    from megatron_copsd.train import make_samples, microbatches

config, other, *overrides = sys.argv[1:]
run = assemble(load_config(config, overrides).config)
try:
    samples = make_samples(run, 0)
    right = log_prob_agreement(run, 0, samples, microbatches(run, samples, "student"))
    print("right weights:", right)
    run.engine.clients[0].call("/update_weights_from_disk", {"model_path": other, "weight_version": "0"})
    samples = make_samples(run, 0)  # the label is right, so no weights are sent
    log_prob_agreement(run, 0, samples, microbatches(run, samples, "student"))
except UserError as error:
    print("noticed:", error)
finally:
    run.engine.close()
    platform.stop()
