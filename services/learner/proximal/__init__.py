"""The proximal policy: exact old log-probs, or a surrogate marked as such."""
