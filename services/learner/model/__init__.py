"""The policy model, its weights as bytes, and the critic."""
