"""Settings of a run: their schema, how they are read, and how they are checked together."""
