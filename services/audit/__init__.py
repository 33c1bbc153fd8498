"""The audit: compares a run's log, history, checkpoints and store, and reports inconsistencies."""
