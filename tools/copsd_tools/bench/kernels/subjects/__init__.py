"""What is computed, and the ways of computing it that are compared."""
