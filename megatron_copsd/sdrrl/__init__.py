"""Self-distillation from resource-rich languages (SDRRL, arXiv 2402.12204): how its training data are made."""
