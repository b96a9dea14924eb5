"""What SGLang imports to build a model on a CPU without AMX, and never calls: on the path of such servers alone."""
