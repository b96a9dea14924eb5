"""Megatron-Core side of the model: parallel groups, construction, passes, optimiser, checkpoints."""
