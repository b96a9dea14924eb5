"""Crosslingual On-Policy Self-Distillation on Megatron-Core."""

__version__ = "0.1.0"
