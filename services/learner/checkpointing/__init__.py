"""Writes, commits, restores and removes checkpoints: the restartable state of the learner."""
