"""Measuring all implementations of one case, in processes of their own."""
