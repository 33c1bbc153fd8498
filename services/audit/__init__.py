"""The audit: what a run's log, history, checkpoints and store say of one another, and where they disagree."""
