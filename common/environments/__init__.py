"""The port of environments, and the built-in environments."""
