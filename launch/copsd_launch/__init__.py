"""Launching runs through nemo-run; imports neither torch nor megatron."""
