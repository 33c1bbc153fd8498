"""Serves an environment to clients of other protocols: `palimpsest env serve` (docs/serving-environments.md)."""
