"""From files to microbatches: problems, prompts, sampling order and batches."""
