"""What a run leaves on disk: where it lies, and who writes and reads it."""
