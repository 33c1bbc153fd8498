"""Sources of old log-probs, and the routes that feed them."""
