"""What the Triton kernels need of GPUs that are not there."""
