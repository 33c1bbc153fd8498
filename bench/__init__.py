"""Measurements: `python -m bench NAME` prints what it does, and one JSON line last. Never asserted in a test."""
