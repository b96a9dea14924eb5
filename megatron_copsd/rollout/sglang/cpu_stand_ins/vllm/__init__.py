"""Stands in for vLLM in servers on CPUs; on GPUs SGLang must find the real one or none."""
