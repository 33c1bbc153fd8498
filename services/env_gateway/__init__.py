"""The environment gateway: tool environments behind numbered, retry-safe sessions."""
