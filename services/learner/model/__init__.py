"""The policy, its weights as bytes, and the critic."""
