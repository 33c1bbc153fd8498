"""Checks of an environment before a run: `palimpsest env check`."""
