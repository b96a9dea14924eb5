"""Losses from hidden states and the output weight's shard: the batch's logits never exist."""
