"""Records that could not be used: list them, send them again."""
