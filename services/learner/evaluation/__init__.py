"""Held-out evaluation during a run: offers, ends, results, the best version (docs/evaluation.md)."""
