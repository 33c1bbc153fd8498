"""The states of all trajectories, the next batch and the next task. Pure."""
