"""From trajectories to rows, padded micro-batches, and the share of each rank. Pure."""
