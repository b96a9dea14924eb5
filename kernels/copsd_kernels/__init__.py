"""Kernels of the fused losses, in torch and in Triton; one vocabulary shard, no collectives."""
