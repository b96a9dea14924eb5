"""Command lines of the project."""
