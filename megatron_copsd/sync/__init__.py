"""Trainer weights to rollout engines."""
