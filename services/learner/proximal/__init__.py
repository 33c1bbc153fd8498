"""What stands in the place of the proximal policy: exact old log-probs, or a surrogate that says so."""
