"""How a configuration is read: YAML texts, and the files that extend each other."""
