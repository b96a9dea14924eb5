"""The losses, by every implementation that there is: time, memory, gradient error, and what arithmetic says."""
