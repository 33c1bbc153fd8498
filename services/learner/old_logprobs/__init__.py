"""Where old log-probs come from, one source a file."""
