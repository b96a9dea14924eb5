"""What all commands have in common: their arguments, how they are found, what they print."""
