"""Sampling responses: the engine protocol and its implementations."""
