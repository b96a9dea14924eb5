"""What each key of a family's config.json means: one table a family."""
