"""What a step minimises: one small file an objective, the same step around them."""
