"""Which trajectories are offered, arrived, trained or dropped; the next batch; the next task. Pure."""
