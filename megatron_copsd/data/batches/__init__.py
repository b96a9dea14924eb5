"""From the samples of a step to the microbatches of a process."""
