"""``streaming``: the kernels that make logits tile by tile, and what launches them."""
