"""Rows of trajectories, padded micro-batches, and the share of each rank. Pure."""
