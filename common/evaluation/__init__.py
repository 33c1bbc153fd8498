"""Held-out tasks and the estimates of an evaluation."""
