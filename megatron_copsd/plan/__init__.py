"""What a layout takes on a GPU and how long its steps last, in plain Python: no torch, no GPU, no network."""
