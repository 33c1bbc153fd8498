"""Between the log and the buffer: read and validate trajectories, offer tasks, write dead letters."""
