"""Measurements: `python -m bench NAME` prints its progress, and the result as a JSON line. Tests assert no result."""
