"""Surrogates for the old log-probs, one per file."""
