"""What can stand in the proximal's place without being the old log-probs, one surrogate a file."""
