"""Hugging Face side of the model: architectures, weight names, reading and writing folders."""
