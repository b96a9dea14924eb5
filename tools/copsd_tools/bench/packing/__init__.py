"""Padded and packed microbatches of sampled responses."""
