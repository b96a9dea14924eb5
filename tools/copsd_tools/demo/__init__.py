"""The demonstration: its problems and model, both stages of its training, and what it shows."""
