"""Lists records that could not be used, and publishes them again."""
